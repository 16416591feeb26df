"""Compressed files: unpacked to a temporary file, as much as a bound allows."""

from __future__ import annotations

import tempfile
import zlib
from typing import IO, BinaryIO, cast

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_INFLATED, MAX_RATIO, MAX_SPOOLED, MIN_INFLATED
from latentguard.files.streams import Window, size_of

_CHUNK = 64 * 1024
_MAGIC = b"\x1f\x8b"


def is_gzip(stream: BinaryIO) -> bool:
    """Whether a file begins as gzip does; leaves the stream at its start.

    A zip archive begins otherwise, so this says nothing against a file of torch.save.
    """
    stream.seek(0)
    found = stream.read(len(_MAGIC)) == _MAGIC
    stream.seek(0)
    return found


def unpacked(stream: BinaryIO, size: int) -> tuple[BinaryIO, int]:
    """What a gzip file holds, as a seekable stream, and its size; small ones stay in memory.

    Raises:
        LatentsError: it holds more than the bounds allow, is damaged or truncated, or has anything
            behind its first part, which readers differ on.
    """
    inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
    target, limit = _target(size)
    stream.seek(0)
    total = 0
    while not inflate.eof:
        packed = inflate.unconsumed_tail or stream.read(_CHUNK)
        if not packed:
            raise LatentsError("is a truncated gzip file")
        try:
            data = inflate.decompress(packed, _CHUNK)
        except zlib.error as error:
            raise LatentsError(f"is a damaged gzip file ({error})") from error
        total += len(data)
        _check(total, limit, size)
        target.write(data)
    if inflate.unused_data or stream.read(1):
        raise LatentsError("is a damaged gzip file: more data follows after its end")
    return target, size_of(target)


def unpacked_zstd(stream: BinaryIO, size: int) -> tuple[BinaryIO, int]:
    """As `unpacked`, of a Zstandard file. Needs pyarrow, and says so in a LatentsError."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise LatentsError(
            "needs pyarrow, which is not installed: pip install 'latentguard[scale]'"
        ) from error
    target, limit = _target(size)
    stream.seek(0)
    total = 0
    try:
        # Closing it must not close the file, which is checked for changes afterward.
        packed = pa.PythonFile(Window(stream, 0, size), mode="r")
        with pa.CompressedInputStream(packed, "zstd") as inflated:
            while data := inflated.read(_CHUNK):
                total += len(data)
                _check(total, limit, size)
                target.write(data)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of this machine's disk, not of the file
        reason = str(error).split("\n", 1)[0][:100]
        raise LatentsError(f"is a truncated or damaged zstd file ({reason})") from error
    return target, size_of(target)


def _target(size: int) -> tuple[BinaryIO, int]:
    """Where a file of `size` bytes is unpacked to, and how large that may become."""
    target = tempfile.SpooledTemporaryFile(max_size=MAX_SPOOLED)  # noqa: SIM115
    limit = min(MAX_INFLATED, MIN_INFLATED + MAX_RATIO * size)
    return cast(BinaryIO, cast(IO[bytes], target)), limit


def _check(total: int, limit: int, size: int) -> None:
    if total > limit:
        raise LatentsError(
            f"unpacks to more than {limit} bytes, the limit for a compressed file of {size}"
        )
