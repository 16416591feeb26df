"""Byte streams of untrusted files: opened only if regular, read exactly or not at all."""

from __future__ import annotations

import io
import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_ZIP_DIRECTORY


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a FIFO, device or folder is an error and never blocks."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _O_BINARY)
    except OSError as error:
        raise LatentsError(f"cannot be opened: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LatentsError("is not a regular file")
    return os.fdopen(descriptor, "rb")


_O_BINARY = getattr(os, "O_BINARY", 0)


def size_of(stream: BinaryIO) -> int:
    """The stream's length in bytes; leaves it at its start."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return size


def read_exactly(stream: BinaryIO, count: int) -> bytes:
    """`count` bytes, or LatentsError where the stream ends before.

    The caller has checked `count` against a bound or against the stream's size.
    """
    data = stream.read(count)
    if len(data) != count:
        raise LatentsError(f"the file is truncated: {count} bytes expected, {len(data)} left")
    return data


class Window(io.RawIOBase):
    """`size` bytes of a stream from `start`, as a seekable stream of its own."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        self._stream, self._start, self._size, self._at = stream, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._at))
        self._stream.seek(self._start + self._at)
        data = self._stream.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def check_zip(stream: BinaryIO, size: int) -> None:
    """LatentsError unless the stream ends as a zip archive with a bounded table of contents.

    Python's zipfile reads that table as a whole, however large an archive says that it is.
    """
    end = 22
    if size < end:
        raise LatentsError("is not a zip archive, or is truncated")
    stream.seek(size - end)
    record = read_exactly(stream, end)
    # Neither torch.save nor numpy writes a comment behind the end record, so it is the end.
    signature, _, _, _, _, directory, _, comment = struct.unpack("<4s4H2LH", record)
    if signature != b"PK\x05\x06" or comment != 0:
        raise LatentsError("is not a zip archive, or is truncated")
    directory = _zip64_directory(stream, size - end) or directory
    if directory > min(MAX_ZIP_DIRECTORY, size):
        raise LatentsError(
            f"has a table of contents of {directory} bytes, over the limit of {MAX_ZIP_DIRECTORY}"
        )
    stream.seek(0)


def _zip64_directory(stream: BinaryIO, end: int) -> int | None:
    """The size of the table of contents in an archive of over 4 GiB, None in a smaller one."""
    locator, record = 20, 56
    if end < locator + record:
        return None
    stream.seek(end - locator - record)
    data = read_exactly(stream, locator + record)
    if data[record : record + 4] != b"PK\x06\x07":
        return None
    (at,) = struct.unpack_from("<Q", data, record + 8)
    if data[:4] != b"PK\x06\x06" or at != end - locator - record:
        raise LatentsError("is a damaged zip archive: its zip64 end record is not at its end")
    (directory,) = struct.unpack_from("<Q", data, 40)
    return int(directory)
