"""A folder for copies that belongs to this process, and is gone with it, however it ends."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

_PREFIX = "latentguard-copies-"
_LOCK = "lock"
_ATTEMPTS = 8


def scratch_folder() -> Path:
    """This process's folder. The first call removes those of processes that were killed."""
    return _made(os.getpid())


@cache
def _made(pid: int) -> Path:
    """pid: a process that was forked has a folder of its own."""
    root = Path(tempfile.gettempdir())
    if hasattr(os, "getuid"):  # elsewhere nobody can tell whose they are, and whether in use
        for left in root.glob(f"{_PREFIX}*"):
            _remove_if_left(left)
    for _ in range(_ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        # Another process may have taken it for one that was left, before it was locked.
        if _lock(folder) is not None:
            break
    atexit.register(_remove, folder, pid)
    return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """Hold a lock on a folder for as long as the descriptor is open. None where that cannot be, as
    another process holds it or has removed it."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing is left to be removed by others
        return None
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(folder / _LOCK, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _remove_if_left(folder: Path) -> None:
    with suppress(OSError):
        # One without a lock has just been made.
        mine = os.lstat(folder).st_uid == os.getuid() and (folder / _LOCK).exists()
        descriptor = _lock(folder) if mine and not folder.is_symlink() else None
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
