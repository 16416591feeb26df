"""Writing a file so that it appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
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
    with _replacing(Path(path)) as (file, _):
        yield file


@contextmanager
def replacing_by_name(path: str | Path, mark: str = "") -> Iterator[Path]:
    """As `replacing`, for libraries that write a file by its name: the new one, still empty.

    mark: stands in the name of the new file, by which its owner finds it should this process die.
    """
    with _replacing(Path(path), mark) as (_, partial):
        yield partial


@contextmanager
def replacing_all(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A new folder, to be written in, and a list, to be filled with the files that belong together.

    When the block ends, they take their places in `folder`, the last one first: a file that names
    others stands before them in the list. Where the block raises, none does.
    """
    with tempfile.TemporaryDirectory(dir=folder if folder.is_dir() else None) as made:
        files: list[Path] = []
        yield Path(made), files
        for file in reversed(files):
            os.replace(file, folder / file.name)


@contextmanager
def _replacing(target: Path, mark: str = "") -> Iterator[tuple[BinaryIO, Path]]:
    partial = target.with_name(f".{mark}{secrets.token_hex(16)}.part")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            _take_mode(descriptor, target)
            yield file, partial
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
