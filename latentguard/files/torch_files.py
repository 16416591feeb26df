""".pt and .pth: zip archives of torch.save, read without torch and without unpickling anything."""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_PICKLE, MAX_SHARD_TORCH_MEMBER
from latentguard.files.claims import Claims, Image, Payload, plan
from latentguard.files.pickle_structure import Tensor, read_structure
from latentguard.files.streams import check_zip, read_exactly
from latentguard.spaces.arrays import BFLOAT16, native

# What torch.save wrote before version 1.6, and what pickle.dump writes, is a bare pickle.
_PICKLE_START = b"\x80"
_FLOATS = (np.dtype("<f2"), np.dtype("<f4"), np.dtype("<f8"), BFLOAT16)


def open_torch(stream: BinaryIO, size: int, claims: Claims, mapped: bool = False) -> Payload:
    """A tensor, a list of tensors, or a dict with `latents` (either) and the known keys.

    mapped: the stream is a file, whose numbers are mapped; else (a shard's member) they are read
    into memory.
    """
    value, places = _read(stream, size)
    if isinstance(value, Mapping):
        claims = Claims.parse(_plain(value)).merged(claims, "the file", "its metadata")
        value = _latents_of(value)
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if not tensors:
        raise LatentsError("holds an empty list: there are no latents in it")
    if not mapped and size > MAX_SHARD_TORCH_MEMBER:
        raise LatentsError(
            f"has {size} bytes, over the limit of {MAX_SHARD_TORCH_MEMBER} for a .pt in a shard"
        )

    def images() -> Iterator[Image | LatentsError]:
        data: bytes | mmap.mmap
        if mapped:
            data = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        else:
            stream.seek(0)
            data = read_exactly(stream, size)
        for tensor in tensors:
            yield from _images(tensor, data, places, claims)

    return Payload(claims, images)


def _read(stream: BinaryIO, size: int) -> tuple[Any, dict[str, int]]:
    """What the archive holds, and at which byte each storage begins, by its key."""
    start = stream.read(4)
    if start[:1] == _PICKLE_START:
        raise LatentsError(
            "is a bare pickle (pickle.dump, or torch.save before 1.6), which could run code when "
            "loaded: refused, nothing of it was executed; save it with torch.save of today"
        )
    if start != b"PK\x03\x04":
        raise LatentsError("is not a file of torch.save, or is truncated")
    check_zip(stream, size)
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = _entries(archive, size)
            structure = archive.read(entries["data.pkl"])
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        if isinstance(error, LatentsError):
            raise
        raise LatentsError(f"is a damaged file of torch.save: {error}") from error
    storages = {name[5:]: entry for name, entry in entries.items() if name.startswith("data/")}
    value = read_structure(structure, {key: entry.file_size for key, entry in storages.items()})
    return value, {key: _begin(stream, entry, size) for key, entry in storages.items()}


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's parts by name, checked against each other and the file's size."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise LatentsError(
                "is a compressed or encrypted archive, which torch.save never writes"
            )
        # Below the archive's own folder, whatever it is called; torch looks names up regardless of
        # case, so two that differ in case are the same.
        name = entry.filename.partition("/")[2].lower()
        if name in entries:
            raise LatentsError(f"is a damaged file of torch.save: it holds {name[:60]!r} twice")
        entries[name] = entry
    if sum(entry.file_size for entry in entries.values()) > size:
        raise LatentsError("is a hostile archive: its parts are larger than the whole")
    if "constants.pkl" in entries or "data.pkl" not in entries:
        raise LatentsError("is not a file of torch.save (a TorchScript model is none, either)")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise LatentsError("was saved on a big-endian machine, which is not supported")
    if entries["data.pkl"].file_size > MAX_PICKLE:
        raise LatentsError(
            f"has a structure of {entries['data.pkl'].file_size} bytes, over the limit of "
            f"{MAX_PICKLE}"
        )
    return entries


def _begin(stream: BinaryIO, entry: zipfile.ZipInfo, size: int) -> int:
    """The byte at which an entry's content begins, behind its local header."""
    stream.seek(entry.header_offset)
    header = read_exactly(stream, 30)
    if header[:4] != b"PK\x03\x04":
        raise LatentsError(f"is a damaged file of torch.save: {entry.filename[:60]!r} is not there")
    name, extra = struct.unpack_from("<HH", header, 26)
    begin: int = entry.header_offset + len(header) + name + extra
    if begin + entry.file_size > size:
        raise LatentsError(
            f"is truncated: {entry.filename[:60]!r} ends at byte {begin + entry.file_size}, "
            f"{size} bytes are there"
        )
    return begin


def _plain(value: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if isinstance(key, str)}


def _latents_of(value: Mapping[Any, Any]) -> Any:
    if "latents" in value:
        return value["latents"]
    tensors = [item for item in value.values() if isinstance(item, Tensor)]
    if len(tensors) != 1:
        names = ", ".join(str(key)[:30] for key in list(value)[:8])
        raise LatentsError(f"needs the key latents, it holds {names or 'nothing'}")
    return tensors[0]


def _images(
    tensor: Any, data: bytes | mmap.mmap, places: Mapping[str, int], claims: Claims
) -> Iterator[Image | LatentsError]:
    if not isinstance(tensor, Tensor):
        yield LatentsError(f"latents must be tensors, got {type(tensor).__name__}")
        return
    if tensor.dtype not in _FLOATS:
        yield LatentsError(f"latents must be floating point numbers, got {tensor.dtype}")
        return
    try:
        layout = plan(tensor.shape, claims)
    except LatentsError as error:
        yield error
        return
    array = _array(tensor, data, places[tensor.key])
    batch = array if array.ndim > len(layout.shape) else array[None]
    for image in batch:
        yield native(image)


def _array(tensor: Tensor, data: bytes | mmap.mmap, begin: int) -> NDArray[Any]:
    """A view of the file's bytes; that it lies within them was checked with the structure."""
    size = tensor.dtype.itemsize
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    numbers = np.frombuffer(data, tensor.dtype, last + 1, begin + tensor.offset * size)
    strides = tuple(step * size for step in tensor.strides)
    return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)
