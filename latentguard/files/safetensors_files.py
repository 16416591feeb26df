""".safetensors: 8 bytes of header length, a JSON header, then numbers; read image by image."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.beside import Beside, channels_of
from latentguard.files.bounds import MAX_AXES, MAX_SAFETENSORS_HEADER
from latentguard.files.choice import COMFYUI, choose
from latentguard.files.claims import Claims, Image, Payload, Plan, is_twofold, plan
from latentguard.files.numbers import Numbers, numbers_of
from latentguard.files.options import NOTHING_SAID, Reading
from latentguard.files.signatures import check_start, kind_of
from latentguard.files.streams import read_exactly
from latentguard.spaces.arrays import BFLOAT16

# Bits of every type that a file may hold beside its latents.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32,
    "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}
_FLOATS = ("F", "BF")
_WHOLE: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
}
# What ComfyUI's LoadLatent looks for, and by what it multiplies where that is not there.
COMFYUI_VERSION = "latent_format_version_0"
COMFYUI_FACTOR = 1.0 / 0.18215
_MUSUBI = {"architecture", "format_version"}
_KINDS: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


def open_safetensors(
    stream: BinaryIO, size: int, claims: Claims, reading: Reading = NOTHING_SAID
) -> Payload:
    """A safetensors file: the tensors that are latents by their names (choice.py), and the known
    metadata keys. A .latent of ComfyUI is one."""
    check_start(stream, size, "a safetensors file")
    header, start = _header(stream, size)
    metadata = _metadata(header)
    declared = Claims.parse(_own(metadata), text=True, pixels=reading.pixels)
    claims = declared.merged(claims, "the file", "the metadata next to it")
    tensors = _tensors(header, size - start)
    choice = choose(
        {n: (tensors[n][1], tensors[n][0].startswith(_FLOATS)) for n in _candidates(tensors)},
        reading,
        sorted(tensors),
        "a tensor named latents",
    )
    if choice.names == (COMFYUI,):
        claims = _of_comfyui(tensors[COMFYUI][1], claims)
    arrays: list[tuple[Numbers, Plan, int]] = []
    for name in choice.names:
        dtype, shape, begin = tensors[name]
        numbers = _numbers(dtype, reading)
        if name == COMFYUI and COMFYUI_VERSION not in tensors:
            numbers = replace(numbers, factor=COMFYUI_FACTOR)
        arrays.append((numbers, plan(shape, claims, choice.moments), start + begin))

    def images() -> Iterator[Image | LatentsError]:
        for numbers, layout, begin in arrays:
            bytes_each = math.prod(layout.stored) * numbers.stored.itemsize
            for index in range(layout.count):
                stream.seek(begin + index * bytes_each)
                image = np.frombuffer(read_exactly(stream, bytes_each), numbers.stored)
                yield numbers.latents(image.reshape(layout.stored)[: layout.shape[0]])

    others = Beside.of(
        (
            (other, tensor[1])
            for other, tensor in tensors.items()
            if other not in choice.names and tensor[0].startswith(_FLOATS)
        ),
        choice.said,
    )
    counts = [(name, a[1].count) for name, a in zip(choice.names, arrays, strict=True)]
    twofold = not choice.moments and any(is_twofold(tensors[name][1]) for name in choice.names)
    return Payload(claims, images, twofold, others, tuple(counts) if choice.several else ())


def read_metadata(stream: BinaryIO, size: int) -> dict[str, str]:
    """What a file says beside its tensors. Raises LatentsError for no safetensors file."""
    return _metadata(_header(stream, size)[0])


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """The metadata, which are taken out of the header."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(v, str) and _is_text(v) and _is_text(k) for k, v in metadata.items()
    ):
        raise LatentsError("has damaged metadata: every value must be text")
    return metadata


def _candidates(tensors: Iterable[str]) -> list[str]:
    """Names of tensors that may be latents, sorted: a file's own order is that of its writer."""
    return sorted(name for name in tensors if name != COMFYUI_VERSION)


def _own(metadata: dict[str, str]) -> dict[str, str]:
    """What metadata say of the latents: musubi-tuner's width and height are of the picture."""
    if metadata.keys() >= _MUSUBI:
        return {key: value for key, value in metadata.items() if key not in ("height", "width")}
    return metadata


def _of_comfyui(shape: tuple[int, ...], claims: Claims) -> Claims:
    """ComfyUI's latents of four and sixteen channels are as the VAE encodes."""
    if len(shape) < 3 or channels_of(shape) not in (4, 16):
        return claims
    return Claims(scaled=False).merged(claims, "a latent of ComfyUI", "the metadata next to it")


def _numbers(dtype: str, reading: Reading) -> Numbers:
    expected = ", ".join(_KINDS)
    stored = {**_KINDS, **_WHOLE}.get(dtype)
    if stored is None:
        raise LatentsError(f"latents must be {expected}, got {dtype[:60]!r}")
    return numbers_of(stored, reading, expected, repr(dtype))


def _header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the numbers begin."""
    if size < 8:
        raise LatentsError("is not a safetensors file: it has fewer than 8 bytes")
    length = int.from_bytes(read_exactly(stream, 8), "little")
    if length > size - 8:
        raise LatentsError(
            f"is truncated or not a safetensors file: its header should have {length} bytes, but "
            f"{size - 8} bytes are there"
        )
    if length > MAX_SAFETENSORS_HEADER:
        raise LatentsError(
            f"has a header of {length} bytes, over the limit of {MAX_SAFETENSORS_HEADER}"
        )
    text = read_exactly(stream, length)
    try:
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_whole, parse_constant=float
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, LatentsError):
            raise
        raise LatentsError("has a damaged safetensors header: it is not JSON") from error
    if not text.startswith(b"{"):
        kind = kind_of(length.to_bytes(8, "little"))
        found = f": it is {kind}" if kind else ""
        raise LatentsError(f"has a damaged safetensors header: it is not a JSON object{found}")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; two values of one key are read differently from reader to reader."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise LatentsError(f"has a damaged safetensors header: it holds {key[:60]!r} twice")
        found[key] = value
    return found


def _whole(text: str) -> int:
    # Python reads -0 as 0, and digits without end; neither is a size.
    if text.startswith("-") or len(text) > 19:
        raise LatentsError(f"has a damaged safetensors header: {text[:30]} is not a size")
    return int(text)


def _tensors(header: dict[str, Any], held: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """dtype, shape and first byte of every tensor; together they must fill the `held` bytes."""
    tensors = {name: _tensor(name, entry, held) for name, entry in header.items()}
    position = 0
    for begin, end, name in sorted((*header[name]["data_offsets"], name) for name in tensors):
        if begin != position:
            raise LatentsError(
                f"has a damaged safetensors header: tensor {name[:60]!r} begins at byte {begin}, "
                f"the one before it ends at byte {position}"
            )
        position = end
    if position != held and tensors:
        raise LatentsError(
            f"has more data after its numbers: the tensors end at byte {position}, but there are "
            f"{held} bytes"
        )
    return tensors


def _tensor(name: str, entry: Any, held: int) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and first byte of one tensor, checked against the bytes that are there."""
    damaged = LatentsError(f"has a damaged safetensors header: tensor {name[:60]!r}")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS or not _is_text(name):
        raise damaged
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise damaged
    if dtype not in {*_KINDS, *_WHOLE} and name == "latents":
        raise LatentsError(f"latents must be {', '.join(_KINDS)}, got {dtype[:60]!r}")
    if dtype not in _BITS:
        raise LatentsError(f"holds tensor {name[:60]!r} of the unknown type {dtype[:60]!r}")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise LatentsError(
            f"has a damaged safetensors header: shape {shape} of {dtype} does not fill bytes "
            f"{begin} to {end}"[:300]
        )
    if end > held:
        raise LatentsError(
            f"is truncated: tensor {name[:60]!r} ends at byte {end}, {held} bytes are there"
        )
    return dtype, tuple(shape), begin


def _is_text(value: str) -> bool:
    """Whether a name is Unicode text: JSON can spell halves of characters, which are none."""
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
    )
