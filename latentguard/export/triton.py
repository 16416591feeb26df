"""`export_triton`: an exported file as a model repository of the Triton Inference Server.

Three models: NAME_scores runs the file (ONNX Runtime backend), NAME_decision turns its scores into
verdicts (Python backend), NAME joins the two, and is what clients call.

(The layout: https://docs.nvidia.com/deeplearning/triton-inference-server/, "Model Repository".)
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from latentguard.errors import ModelError
from latentguard.export.triton_config import (
    Tensor,
    TritonOptions,
    decision_config,
    ensemble_config,
    scores_config,
)
from latentguard.runtime.artifact import Artifact, open_artifact
from latentguard.runtime.session import create_session

# The element types of ONNX Runtime that an export has.
_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64",
}


@dataclass(frozen=True)
class Repository:
    """A written repository: its path, the models in it (the one for clients first), the SHA-256
    of the file that it serves."""

    path: Path
    models: tuple[str, str, str]
    sha256: str


def export_triton(
    source: str | Path,
    out: str | Path,
    options: TritonOptions | None = None,
    *,
    sha256: str | None = None,
) -> Repository:
    """Write the model repository of an exported file, or a further version into one that exists.

    Args:
        source: a file that `latentguard export onnx` wrote.
        out: the repository, a folder; other models in it are left alone.
        options: names, version, batching, instances.
        sha256: the pinned digest of `source`.

    Raises ModelError where `source` is no export, ONNX Runtime refuses it, or its policy has a
    `cascade`, and where `out` holds this version already.
    """
    options = options or TritonOptions()
    artifact = open_artifact(source, sha256)
    if artifact.first is not None:
        raise ModelError(
            f"{source}: holds a cascade, and a Triton ensemble runs all of its models on every "
            "image: give it a policy without `cascade` (latentguard export swap), so that the "
            "second model judges all"
        )
    inputs, outputs = _tensors(artifact)
    rules = _rules(artifact)
    out = Path(out)
    version = str(options.version)
    for model in options.models:
        if (out / model / version).exists():
            raise ModelError(
                f"{out}: holds version {version} of {model} already: choose a higher --version, or "
                "another folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    ensemble, scores, decision = options.models
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".triton-") as folder:
        made = Path(folder)
        _write_scores(made / scores / version, artifact)
        _write_decision(made / decision / version, rules)
        # An ensemble has no files, but Triton looks for the folder of its version, and copies of
        # a repository may leave out an empty one.
        (made / ensemble / version).mkdir(parents=True)
        (made / ensemble / version / ".keep").touch()
        configs = {
            scores: scores_config(options, inputs, outputs, rules),
            decision: decision_config(options, inputs, outputs),
            ensemble: ensemble_config(options, inputs, outputs),
        }
        # The ensemble last: nothing refers to a model that is not there yet.
        for model, config in configs.items():
            (made / model / "config.pbtxt").write_text(config, encoding="utf-8")
            (out / model).mkdir(exist_ok=True)
            os.replace(made / model / version, out / model / version)
            os.replace(made / model / "config.pbtxt", out / model / "config.pbtxt")
    return Repository(out, options.models, artifact.sha256)


def _tensors(artifact: Artifact) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs as ONNX Runtime, and so Triton's backend, sees them."""
    session = create_session(artifact, ["CPUExecutionProvider"], None)
    return (
        [_tensor(artifact.path, node) for node in session.get_inputs()],
        [_tensor(artifact.path, node) for node in session.get_outputs()],
    )


def _tensor(path: Path, node: Any) -> Tensor:
    """One input or output without its first axis, which is the images; -1 is an open size."""
    if node.type not in _TYPES:
        raise ModelError(f"{path}: {node.name} is a {node.type}, which no export of ours has")
    if not node.shape or isinstance(node.shape[0], int):
        raise ModelError(f"{path}: {node.name} has a fixed number of images, {node.shape}")
    dims = tuple(size if isinstance(size, int) else -1 for size in node.shape[1:])
    return Tensor(node.name, _TYPES[node.type], dims)


def _rules(artifact: Artifact) -> dict[str, Any]:
    """What the decision step needs to know."""
    kept = ("schema_version", "policy", "prompts", "covered", "seen", "model", "space", "scaled")
    return {key: artifact.metadata[key] for key in kept} | {"sha256": artifact.sha256}


def _write_scores(folder: Path, artifact: Artifact) -> None:
    """The file as model.onnx; its external data beside it, under the names that it has for them."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(artifact.data)
    for name, data in artifact.external.items():
        (folder / name).write_bytes(data)


def _write_decision(folder: Path, rules: dict[str, Any]) -> None:
    """model.py, the rules, and the judge: it needs NumPy, and latentguard not installed."""
    package = folder / "latentguard"
    (package / "judge").mkdir(parents=True)
    ours = resources.files("latentguard")
    (folder / "model.py").write_text(
        (ours / "export" / "triton_decision.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (package / "__init__.py").write_text('"""The part of latentguard that decides."""\n')
    parts = [part for part in (ours / "judge").iterdir() if part.name.endswith(".py")]
    beside = [(ours / name, name) for name in ("deprecated.py", "errors.py")]
    for part, name in (*beside, *((p, f"judge/{p.name}") for p in parts)):
        (package / name).write_text(part.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "rules.json").write_text(json.dumps(rules, sort_keys=True, allow_nan=False))
