"""Latents from the bytes of a request: .npy or .safetensors, told apart by how they begin.

The bytes are untrusted: nothing is unpickled, headers are bounded and checked against the bytes
that are there, and nothing is allocated for a size that only a header claims. NumPy only.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_HEADER = 10_000
MAX_AXES = 8
_NPY = b"\x93NUMPY"
_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


class BodyError(ValueError):
    """The bytes are not latents; the message says why, and what would be right."""


@dataclass(frozen=True)
class Body:
    """An array, and what the file says of it; None where it says nothing."""

    array: NDArray[Any]
    space: str | None = None
    scaled: bool | None = None


def read_body(data: bytes) -> Body:
    """The latents in `data`. Raises BodyError."""
    return _read_npy(data) if data.startswith(_NPY) else _read_safetensors(data)


def _read_npy(data: bytes) -> Body:
    version = tuple(data[6:8])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise BodyError(f"a .npy of version {version}; known are 1.0 to 3.0")
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(data[8 : 8 + width], "little")
    start = 8 + width + length
    if length > MAX_HEADER or start > len(data):
        raise BodyError(f"a .npy header of {length} bytes; at most {MAX_HEADER} and the body's end")
    read = (
        np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    )
    try:
        shape, fortran, dtype = read(io.BytesIO(data[8:start]), max_header_size=MAX_HEADER)
    except Exception as error:  # literal_eval of hostile text raises a dozen types
        raise BodyError("a damaged .npy header") from error
    if dtype.hasobject or dtype.str[1:] not in ("f2", "f4", "f8"):
        raise BodyError(f"latents must be float16, float32 or float64, got {dtype}"[:200])
    if fortran and len(shape) > 1:
        raise BodyError("a .npy in Fortran order: save np.ascontiguousarray(latents)")
    return Body(_array(data, start, len(data), shape, dtype))


def _read_safetensors(data: bytes) -> Body:
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if len(data) < 8 or start > len(data) or length > MAX_HEADER:
        raise BodyError("neither .npy nor .safetensors, or cut off")
    try:
        header = json.loads(data[8:start])
    except (ValueError, RecursionError) as error:
        raise BodyError("a damaged .safetensors header: it is not JSON") from error
    if not isinstance(header, dict):
        raise BodyError("a damaged .safetensors header: it is not a JSON object")
    metadata = header.pop("__metadata__", {})
    name = "latents" if "latents" in header else next(iter(header), "")
    if not isinstance(metadata, dict) or (name != "latents" and len(header) != 1):
        raise BodyError("a .safetensors must hold one tensor, or one named latents")
    entry = header[name]
    if not isinstance(entry, dict):
        raise BodyError("a damaged .safetensors header: a tensor must be a JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    sizes = _sizes(shape) and _sizes(offsets)
    if not isinstance(dtype, str) or dtype not in _BYTES or not sizes or len(offsets) != 2:
        raise BodyError(f"a damaged .safetensors header, or latents not in {', '.join(_BYTES)}")
    begin, end = start + offsets[0], start + offsets[1]
    if end > len(data):
        raise BodyError("a .safetensors that is cut off")
    if dtype == "BF16":
        # The upper half of a float32.
        halves = _array(data, begin, end, shape, np.dtype("<u2"))
        array: NDArray[Any] = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        array = _array(data, begin, end, shape, np.dtype(_DTYPES[dtype]))
    return Body(array, _space(metadata.get("space")), _scaled(metadata.get("scaled")))


def _array(data: bytes, begin: int, end: int, shape: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    if len(shape) > MAX_AXES or any(isinstance(n, bool) or n < 0 for n in shape):
        raise BodyError(f"an impossible shape {list(shape)}"[:200])
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise BodyError(
            f"shape {list(shape)} of {dtype.name} does not fill the {end - begin} bytes that are "
            "there"[:300]
        )
    return np.frombuffer(data[begin:end], dtype).reshape(shape)


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _space(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and len(value) < 100):
        raise BodyError("metadata space must be the name of a latent space")
    return value


def _scaled(value: Any) -> bool | None:
    """As `latentguard.files` writes it: JSON text."""
    known = {"true": True, "false": False}
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in known:
        raise BodyError("metadata scaled must be true or false")
    return known[value.lower()]
