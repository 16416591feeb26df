"""Runs REPOSITORY/MODEL/VERSION/model.py on MODEL/inputs.npz as Triton's Python backend does: as
the module "VERSION.model", in a process of its own. Only NumPy and the standard library are there.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np

FORBIDDEN = ("torch", "onnxruntime", "onnx", "pydantic", "yaml", "safetensors")


class Absent:
    """A finder that makes packages absent, whatever this environment has."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}")


def main() -> None:
    folder = Path(sys.argv[1])
    sys.meta_path.insert(0, Absent())
    sys.path.insert(0, str(Path(__file__).parent))
    # The order in which the backend extends the path.
    sys.path += [str(folder), str(folder.parent)]
    import triton_python_backend_utils as pb_utils

    module = importlib.import_module(f"{folder.name}.model")
    import latentguard

    assert Path(latentguard.__file__).parent == folder / "latentguard", latentguard.__file__
    with np.load(folder.parent / "inputs.npz") as arrays:
        tensors = [pb_utils.Tensor(name, arrays[name]) for name in arrays.files]
    model = module.TritonPythonModel()
    model.initialize({"model_name": folder.parent.name, "model_version": folder.name})
    (response,) = model.execute([pb_utils.InferenceRequest(tensors)])
    error = response.error().message() if response.has_error() else None
    # Triton drops the tensors of a response with an error.
    assert error is None or response.output_tensors() == []
    found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    plain = {
        name: value.astype("S") if value.dtype == object else value for name, value in found.items()
    }
    np.savez(folder.parent / "outputs.npz", **plain)
    print(json.dumps({"error": error}))


if __name__ == "__main__":
    main()
