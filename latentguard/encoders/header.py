"""Files of weights, read without torch: each is opened once, and what it says of itself is said by
the same bytes that its weights come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from latentguard.errors import ModelError
from latentguard.regular import RefusedError, open_regular, problem
from latentguard.text import first_line

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
        opening = open_regular(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelError(f"{path}: {problem(error)}") from error
    with opening as file:
        before = os.fstat(file.fileno())
        try:
            yield file
        except RefusedError as error:
            raise ModelError(f"{path}: {problem(error)}") from error
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ModelError(f"{path}: changed while it was read")


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
