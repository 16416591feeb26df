"""The weights of a packaged model, read without torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import ModelError
from latentguard.regular import problem, read_bounded
from latentguard.runtime.layout import ENTRY, MODEL
from latentguard.runtime.wire import fields, read

MAX_BYTES = 64 << 20
MAX_GRAPH = 4 << 20

WEIGHTS = "latentguard.weights"
"""The metadata of a packaged graph that names the weights it was made for, by SHA-256."""

_METADATA = next(number for number, spec in MODEL.fields.items() if spec.of is ENTRY)
_DTYPES = {"F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Weights:
    """A safetensors file of a nano model.

    data: all of its bytes. sha256: of them. tensors: by name. places: of each the bytes from where
    to where in the file.
    """

    path: Path
    data: bytes
    sha256: str
    metadata: dict[str, str]
    tensors: dict[str, NDArray[Any]]
    places: dict[str, tuple[int, int]]

    def text(self, key: str) -> Any:
        """A value of the metadata that is JSON."""
        return json.loads(self.metadata[key])


def read_weights(path: Path) -> Weights:
    """Read a file of the package. Raises ModelError where it is gone or damaged."""
    try:
        data = read_bounded(path, MAX_BYTES)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__")
        begin = 8 + size
        places = {
            key: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
            for key, entry in header.items()
        }
        tensors = {
            key: np.frombuffer(data[slice(*places[key])], _DTYPES[entry["dtype"]]).reshape(
                entry["shape"]
            )
            for key, entry in header.items()
        }
    except OSError as error:
        raise ModelError(f"{path}: {problem(error)}: install latentguard anew") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: damaged ({error}): install latentguard anew") from error
    return Weights(path, data, hashlib.sha256(data).hexdigest(), metadata, tensors, places)


def read_graph(weights: Weights) -> bytes:
    """The graph beside a model's weights. Raises ModelError where it is gone, or of others."""
    path = weights.path.with_suffix(".onnx")
    try:
        graph = read_bounded(path, MAX_GRAPH)
        entries = [
            read(graph[item.begin : item.end], ENTRY)
            for item in fields(graph)
            if item.number == _METADATA
        ]
    except OSError as error:
        raise ModelError(f"{path}: {problem(error)}: install latentguard anew") from error
    except ValueError as error:
        raise ModelError(f"{path}: damaged ({error}): install latentguard anew") from error
    if {"key": WEIGHTS, "value": weights.sha256} not in entries:
        raise ModelError(
            f"{path}: was not made for {weights.path.name} ({weights.sha256[:12]}): install "
            "latentguard anew, or make it by python -m latentguard.export.bundle"
        )
    return graph
