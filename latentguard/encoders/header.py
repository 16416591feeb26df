"""Files of weights, read without torch: each is opened once, and what it says of itself is said by
the same bytes that its weights come from.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from latentguard.errors import ModelError

# The format's own limit for the JSON header.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Header:
    """What stands before the numbers of a safetensors file: its metadata, its tensors' shapes."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, and the same one for as long as it is open, whatever becomes of its name.

    Raises ModelError where it cannot be opened, is no regular file, or was written to meanwhile.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _O_BINARY)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ModelError(f"{path}: cannot be read: {reason or error}") from error
    before = os.fstat(descriptor)
    if not stat.S_ISREG(before.st_mode):
        os.close(descriptor)
        raise ModelError(f"{path}: is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ModelError(f"{path}: changed while it was read")


_O_BINARY = getattr(os, "O_BINARY", 0)


def read_header(path: Path, file: BinaryIO) -> Header:
    """The header of a safetensors file. Raises ModelError where it has none of ours."""
    try:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(MAX_HEADER, length - 8):
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(file.read(size))
        metadata = header["__metadata__"]
        if not isinstance(metadata, dict):
            raise TypeError("metadata that is not a dict")
        shapes = {key: _shape(value) for key, value in header.items() if key != "__metadata__"}
        # One byte a number is the least that a type has.
        if sum(map(prod, shapes.values())) > length:
            raise ValueError("tensors that are larger than the file")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path}: not a safetensors file with latentguard's metadata ({first_line(error)})"
        ) from error
    return Header({str(key): str(value) for key, value in metadata.items()}, shapes)


def _shape(entry: Any) -> tuple[int, ...]:
    sizes = entry["shape"]
    if not isinstance(sizes, list) or not all(type(n) is int and n >= 0 for n in sizes):
        raise TypeError("a shape that is no list of sizes")
    return tuple(sizes)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, from its header alone; ModelError if it has none."""
    with opened(path) as file:
        return read_header(path, file).metadata


def read_bytes(path: Path, file: BinaryIO) -> bytes:
    """All bytes of an open file. Raises ModelError where there are more or fewer than it says."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    data = file.read(size + 1)
    if len(data) != size:
        raise ModelError(f"{path}: changed while it was read")
    return data


def digest_of(file: BufferedReader) -> str:
    """SHA-256 of an open file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """The gist of a library's error: its first line, its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
