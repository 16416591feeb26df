""".pt and .pth: zip archives of torch.save, checked before torch.load(weights_only=True)."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_PICKLE, MAX_SHARD_TORCH_MEMBER
from latentguard.files.claims import Claims, Payload, plan
from latentguard.files.pickle_structure import check_structure
from latentguard.files.streams import check_zip, read_exactly

if TYPE_CHECKING:
    from torch import Tensor

# What torch.save wrote before version 1.6, and what pickle.dump writes, is a bare pickle.
_PICKLE_START = b"\x80"


def open_torch(stream: BinaryIO, size: int, claims: Claims, path: Path | None = None) -> Payload:
    """A tensor, a list of tensors, or a dict with `latents` (either) and the known keys.

    With a path the numbers stay in the file and are mapped, else (a shard's member) they are
    read into memory.
    """
    _check_archive(stream, size)
    value = _load(stream, size, path)
    if isinstance(value, Mapping):
        claims = Claims.parse(_plain(value)).merged(claims, "the file", "its metadata")
        value = _latents_of(value)
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if not tensors:
        raise LatentsError("holds an empty list: there are no latents in it")

    def images() -> Iterator[Tensor | LatentsError]:
        for tensor in tensors:
            yield from _images(tensor, claims)

    return Payload(claims, images)


def _check_archive(stream: BinaryIO, size: int) -> None:
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
            _check_entries(archive, size)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        if isinstance(error, LatentsError):
            raise
        raise LatentsError(f"is a damaged file of torch.save: {error}") from error


def _check_entries(archive: zipfile.ZipFile, size: int) -> None:
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
    structure = entries["data.pkl"]
    if structure.file_size > MAX_PICKLE:
        raise LatentsError(
            f"has a structure of {structure.file_size} bytes, over the limit of {MAX_PICKLE}"
        )
    sizes = {name[5:]: e.file_size for name, e in entries.items() if name.startswith("data/")}
    check_structure(archive.read(structure), sizes)


def _load(stream: BinaryIO, size: int, path: Path | None) -> Any:
    import torch

    try:
        if path is not None:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if size > MAX_SHARD_TORCH_MEMBER:
            raise LatentsError(
                f"has {size} bytes, over the limit of {MAX_SHARD_TORCH_MEMBER} for a .pt in a shard"
            )
        stream.seek(0)
        data = io.BytesIO(read_exactly(stream, size))
        return torch.load(data, map_location="cpu", weights_only=True)
    except LatentsError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, ...
        reason = str(error).split("\n", 1)[0][:200]
        raise LatentsError(f"is refused by torch.load(weights_only=True): {reason}") from error


def _plain(value: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if isinstance(key, str)}


def _latents_of(value: Mapping[Any, Any]) -> Any:
    import torch

    if "latents" in value:
        return value["latents"]
    tensors = [item for item in value.values() if isinstance(item, torch.Tensor)]
    if len(tensors) != 1:
        names = ", ".join(str(key)[:30] for key in list(value)[:8])
        raise LatentsError(f"needs the key latents, it holds {names or 'nothing'}")
    return tensors[0]


def _images(tensor: Any, claims: Claims) -> Iterator[Tensor | LatentsError]:
    import torch

    if not isinstance(tensor, torch.Tensor):
        yield LatentsError(f"latents must be tensors, got {type(tensor).__name__}")
        return
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield LatentsError(f"latents must be floating point numbers, got {dtype}")
        return
    try:
        layout = plan(tuple(tensor.shape), claims)
    except LatentsError as error:
        yield error
        return
    batch = tensor if tensor.ndim > len(layout.shape) else tensor[None]
    for image in batch.detach():
        # A copy: the file's mapping must not outlive the reading of it.
        yield image.contiguous().clone()
