"""Byte streams of untrusted files: opened only if regular, read exactly or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from latentguard import regular
from latentguard.errors import LatentsError

Item = TypeVar("Item")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a FIFO, device or folder is an error and never blocks."""
    try:
        return regular.open_regular(path)
    except OSError as error:
        raise LatentsError(regular.problem(error, "opened")) from error


def size_of(stream: BinaryIO) -> int:
    """The stream's length in bytes; leaves it at its start."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return size


State = tuple[int, ...]


def state_of(stream: BinaryIO, path: Path) -> State:
    """A state that changes if something writes to an open file, or replaces it by another one.

    Its size, its times of change (the second one cannot be set back), and which file the path
    leads to.
    """
    status = os.fstat(stream.fileno())
    try:
        there = os.stat(path)
        which = (there.st_dev, there.st_ino)
    except OSError:
        which = (-1, -1)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, *which


def unchanged(stream: BinaryIO, path: Path, before: State, items: Iterator[Item]) -> Iterator[Item]:
    """The items that are read from an open file, as long as its `state_of` does not change.

    Raises LatentsError as soon as it changes, because the file no longer holds what was judged.
    """
    try:
        for item in items:
            if state_of(stream, path) != before:
                break
            yield item
    except LatentsError:
        if state_of(stream, path) == before:
            raise
    if state_of(stream, path) != before:
        raise LatentsError("changed while it was read: scan it again when nothing writes to it")


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
