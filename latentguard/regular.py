"""Files that may be anything: opened only if regular, read whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path


class RefusedError(OSError):
    """A file that could be opened and is not used; `strerror` says why, as a whole predicate."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EINVAL, why)


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file, for reading. Raises OSError as `regular_descriptor` does."""
    return os.fdopen(regular_descriptor(path), "rb")


def regular_descriptor(path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """As os.open, for regular files alone: a FIFO or device is an error and never blocks.

    The descriptor that is asked is the one that is used, whatever becomes of the name.
    Raises RefusedError where it is none, other OSErrors where it cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for its other end.
        descriptor = os.open(path, flags | _FLAGS, mode)
    except ValueError as error:  # a NUL byte in the path
        raise OSError(errno.EINVAL, str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError("is not a regular file")
    return descriptor


_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_whole(file: BufferedReader) -> bytes:
    """All bytes of an open file. Raises RefusedError where they are more or fewer than its size."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    # One byte more than there should be: a file that grows meanwhile is another one.
    data = file.read(size + 1)
    if len(data) != size:
        raise RefusedError("changed while it was read")
    return data


def read_bounded(path: str | Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes, a whole number of MiB.

    Raises RefusedError for a larger one, and OSErrors as `open_regular` does.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise RefusedError(f"is larger than {limit >> 20} MiB")
        return read_whole(file)


def sha256_of(file: BufferedReader) -> str:
    """Hex digest of an open file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def problem(error: OSError, verb: str = "read") -> str:
    """Why a file is not used, as what follows its name in a sentence."""
    if isinstance(error, RefusedError):
        return str(error.strerror)
    return f"cannot be {verb}: {error.strerror or error}"
