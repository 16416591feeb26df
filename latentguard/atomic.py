"""Writing a file so that it appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file, to be written, that takes the place of `path` when the block ends.

    Where the block raises, `path` stays as it was. The new file lies beside it under a name that
    nobody can foresee, and is never one that exists, nor what a link leads to. It has the mode of
    the file that it replaces, else the one that the process gives to its files.

    Raises OSError where the folder cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{secrets.token_hex(16)}.part")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            _take_mode(descriptor, target)
            yield file
            file.flush()
            # Otherwise the new name may reach the disk before the new content.
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def _take_mode(descriptor: int, target: Path) -> None:
    try:
        mode = os.lstat(target).st_mode
    except OSError:
        return
    if stat.S_ISREG(mode) and hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(mode) & 0o777)
