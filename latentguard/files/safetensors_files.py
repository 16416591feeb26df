""".safetensors: 8 bytes of header length, a JSON header, then numbers; read image by image."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_AXES, MAX_SAFETENSORS_HEADER
from latentguard.files.claims import Claims, Image, Payload, plan
from latentguard.files.streams import read_exactly
from latentguard.spaces.arrays import BFLOAT16, native

_KINDS = {"F16": np.dtype("<f2"), "BF16": BFLOAT16, "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def open_safetensors(stream: BinaryIO, size: int, claims: Claims) -> Payload:
    """A safetensors file: the tensor `latents` (or the only one) and the known metadata keys."""
    header, start = _header(stream, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise LatentsError("has damaged metadata: every value must be text")
    claims = Claims.parse(metadata, text=True).merged(claims, "the file", "its metadata")
    name = "latents" if "latents" in header else next(iter(header), "")
    if name not in header or (name != "latents" and len(header) > 1):
        names = ", ".join(sorted(header))[:120]
        raise LatentsError(f"needs a tensor named latents, it holds {names or 'nothing'}")
    dtype, shape, begin = _tensor(name, header[name], size - start)
    layout = plan(shape, claims)

    def images() -> Iterator[Image | LatentsError]:
        kind = _KINDS[dtype]
        bytes_each = math.prod(layout.shape) * kind.itemsize
        for index in range(layout.count):
            stream.seek(start + begin + index * bytes_each)
            numbers = np.frombuffer(read_exactly(stream, bytes_each), kind)
            yield native(numbers.reshape(layout.shape))

    return Payload(claims, images)


def _header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the numbers begin."""
    if size < 8:
        raise LatentsError("is not a safetensors file: it has fewer than 8 bytes")
    length = int.from_bytes(read_exactly(stream, 8), "little")
    if length > size - 8:
        raise LatentsError(
            f"is truncated or no safetensors file: a header of {length} bytes is announced, "
            f"{size - 8} bytes are there"
        )
    if length > MAX_SAFETENSORS_HEADER:
        raise LatentsError(
            f"has a header of {length} bytes, over the limit of {MAX_SAFETENSORS_HEADER}"
        )
    try:
        header = json.loads(read_exactly(stream, length))
    except (ValueError, RecursionError) as error:
        raise LatentsError("has a damaged safetensors header: it is not JSON") from error
    if not isinstance(header, dict):
        raise LatentsError("has a damaged safetensors header: it is not a JSON object")
    return header, 8 + length


def _tensor(name: str, entry: Any, held: int) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and first byte of one tensor, checked against the bytes that are there."""
    damaged = LatentsError(f"has a damaged safetensors header: tensor {name[:60]!r}")
    if not isinstance(entry, dict):
        raise damaged
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise damaged
    if dtype not in _KINDS:
        raise LatentsError(f"latents must be {', '.join(_KINDS)}, got {dtype[:60]!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * _KINDS[dtype].itemsize:
        raise LatentsError(
            f"has a damaged safetensors header: shape {shape} of {dtype} does not fill bytes "
            f"{begin} to {end}"[:300]
        )
    if end > held:
        raise LatentsError(
            f"is truncated: tensor {name[:60]!r} ends at byte {end}, {held} bytes are there"
        )
    return dtype, tuple(shape), begin


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
    )
