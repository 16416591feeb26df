"""A Triton repository run without Triton: its schema, and its ensemble step by step."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STAND_IN = Path(__file__).parent / "triton_stand_in"


def model_config_type() -> Any:
    """The published schema's ModelConfig. tritonclient carries it; its __init__ would want gRPC."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("checking against Triton's schema needs the package tritonclient")
    path = Path(found.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


def read_configs(repository: Path) -> dict[str, Any]:
    """Every config.pbtxt, parsed strictly: an unknown field or a wrong type raises."""
    from google.protobuf import text_format

    kind = model_config_type()
    return {
        path.parent.name: text_format.Parse(path.read_text(), kind())
        for path in sorted(repository.glob("*/config.pbtxt"))
    }


def run_ensemble(repository: Path, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the ensemble answers, wired as its config says. RuntimeError where a step errs."""
    configs = read_configs(repository)
    tensors = dict(inputs)
    for step in configs[name].ensemble_scheduling.step:
        config = configs[step.model_name]
        folder = repository / step.model_name / str(step.model_version)
        given = {key: tensors[value] for key, value in step.input_map.items()}
        run = run_onnx if config.backend == "onnxruntime" else run_python
        found = run(folder, given, [output.name for output in config.output])
        tensors |= {value: found[key] for key, value in step.output_map.items()}
    return {output.name: tensors[output.name] for output in configs[name].output}


def run_onnx(folder: Path, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
    """The ONNX Runtime backend's part, by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return dict(zip(outputs, session.run(outputs, inputs), strict=True))


def run_python(folder: Path, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
    """The Python backend's part: model.py in a process that has nothing but NumPy."""
    np.savez(folder.parent / "inputs.npz", **inputs)
    ran = subprocess.run(
        [sys.executable, "-P", str(STAND_IN / "run_model.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    if answer["error"] is not None:
        raise RuntimeError(answer["error"])
    with np.load(folder.parent / "outputs.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    assert set(found) == set(outputs)
    return found
