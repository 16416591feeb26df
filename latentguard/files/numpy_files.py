""".npy and .npz: headers are checked against the file's size, images are read one by one."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_AXES, MAX_INFLATED, MAX_METADATA, MAX_NPY_HEADER
from latentguard.files.claims import KEYS, Claims, Image, Payload, plan
from latentguard.files.streams import check_zip, read_exactly

FLOATS = ("f2", "f4", "f8")
_CLAIM_KINDS = "bUiuf"


def open_npy(stream: BinaryIO, size: int, claims: Claims) -> Payload:
    """A .npy file; it carries nothing but numbers, so `claims` come from elsewhere."""
    header = _header(stream, size)

    def images() -> Iterator[Image | LatentsError]:
        stream.seek(header.start)
        return _images(stream, header, claims)

    plan(header.shape, claims)
    return Payload(claims, images)


def open_npz(stream: BinaryIO, size: int, claims: Claims) -> Payload:
    """An .npz: the array `latents` (or the only one of three or more axes) and the known keys."""
    check_zip(stream, size)
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise LatentsError(f"is a damaged .npz: {error}") from error
    entries = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        if name in entries:
            raise LatentsError(f"is a damaged .npz: it holds {name[:60]!r} twice")
        entries[name] = _checked(entry, size)
    values = {name: _small(archive, entries[name]) for name in KEYS & entries.keys()}
    claims = Claims.parse(values).merged(claims, "the file", "its metadata")
    entry = _latents_entry(archive, entries)
    with archive.open(entry) as member:
        header = _header(cast(BinaryIO, member), entry.file_size)
    plan(header.shape, claims)

    def images() -> Iterator[Image | LatentsError]:
        try:
            with archive.open(entry) as member:
                read_exactly(cast(BinaryIO, member), header.start)
                yield from _images(cast(BinaryIO, member), header, claims)
        except _ZIP_ERRORS as error:
            raise LatentsError(f"is a damaged .npz: {error}") from error

    return Payload(claims, images)


_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


class _Header:
    """The checked header of a .npy stream; `start` is where the numbers begin."""

    __slots__ = ("dtype", "shape", "start")

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], start: int) -> None:
        self.dtype, self.shape, self.start = dtype, shape, start


def _header(stream: BinaryIO, size: int) -> _Header:
    """Read and check the header; the stream is at its start, and `size` bytes long."""
    dtype, shape, start = _any_header(stream, size)
    if dtype.str[1:] not in FLOATS:
        kind = "objects, which would have to be unpickled" if dtype.hasobject else f"{dtype}"
        raise LatentsError(f"latents must be float16, float32 or float64, got {kind}"[:200])
    _check_size(dtype, shape, size - start)
    return _Header(dtype, shape, start)


def _any_header(stream: BinaryIO, size: int) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    prefix = stream.read(8)
    if len(prefix) < 8 or prefix[:6] != b"\x93NUMPY":
        raise LatentsError("is not a .npy file, or is truncated")
    version = (prefix[6], prefix[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise LatentsError(f"has .npy version {version[0]}.{version[1]}, known are 1.0 to 3.0")
    width = 2 if version == (1, 0) else 4
    length_bytes = read_exactly(stream, width)
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_NPY_HEADER:
        raise LatentsError(f"has a header of {length} bytes, over the limit of {MAX_NPY_HEADER}")
    text = read_exactly(stream, length)
    # Version 3.0 differs from 2.0 in its text encoding alone, which matters to field names only.
    read = (
        np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    )
    try:
        shape, fortran, dtype = read(io.BytesIO(length_bytes + text))
    except Exception as error:  # literal_eval of hostile text raises a dozen types
        raise LatentsError("has a damaged .npy header") from error
    if fortran and len(shape) > 1:
        raise LatentsError("is in Fortran order: save np.ascontiguousarray(latents)")
    if len(shape) > MAX_AXES or any(isinstance(axis, bool) or axis < 0 for axis in shape):
        raise LatentsError(f"has an impossible shape {list(shape)}"[:200])
    return dtype, tuple(shape), 8 + width + length


def _check_size(dtype: np.dtype[Any], shape: tuple[int, ...], held: int) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if expected != held:
        short = "is truncated" if expected > held else "has something behind its numbers"
        raise LatentsError(
            f"{short}: the header says shape {list(shape)} of {dtype.name}, {expected} bytes, and "
            f"{held} are there"
        )


def _images(stream: BinaryIO, header: _Header, claims: Claims) -> Iterator[Image | LatentsError]:
    """Every image of an array whose numbers begin where the stream stands."""
    layout = plan(header.shape, claims)
    for index in range(layout.count):
        bytes_each = math.prod(layout.shape) * header.dtype.itemsize
        if stream.seekable() and not isinstance(stream, zipfile.ZipExtFile):
            # Others may have moved the stream between two images.
            stream.seek(header.start + index * bytes_each)
        numbers = np.frombuffer(read_exactly(stream, bytes_each), dtype=header.dtype)
        yield numbers.reshape(layout.shape).astype(header.dtype.newbyteorder("="))


# -- .npz ------------------------------------------------------------------------------------


def _checked(entry: zipfile.ZipInfo, size: int) -> zipfile.ZipInfo:
    name = entry.filename[:60]
    if entry.flag_bits & 1:
        raise LatentsError(f"holds {name!r} encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise LatentsError(f"holds {name!r} in an unknown compression {entry.compress_type}")
    limit = size if entry.compress_type == zipfile.ZIP_STORED else MAX_INFLATED
    if entry.file_size > limit:
        raise LatentsError(
            f"holds {name!r} of {entry.file_size} bytes, over the limit of {limit} for this file"
        )
    return entry


def _latents_entry(
    archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]
) -> zipfile.ZipInfo:
    if "latents" in entries:
        return entries["latents"]
    candidates = [e for name, e in entries.items() if name not in KEYS]
    if len(candidates) != 1:
        names = ", ".join(sorted(entries))[:120]
        raise LatentsError(f"needs an array named latents, it holds {names or 'nothing'}")
    return candidates[0]


def _small(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    """One of the known keys, as plain Python."""
    if entry.file_size > MAX_METADATA:
        raise LatentsError(f"holds {entry.filename!r} of {entry.file_size} bytes: too long")
    try:
        data = archive.read(entry)
    except _ZIP_ERRORS as error:
        raise LatentsError(f"is a damaged .npz: {error}") from error
    stream = io.BytesIO(data)
    dtype, shape, start = _any_header(stream, len(data))
    if dtype.kind not in _CLAIM_KINDS:
        raise LatentsError(f"holds {entry.filename!r} of {dtype}: text, numbers or truth expected")
    _check_size(dtype, shape, len(data) - start)
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).tolist()
