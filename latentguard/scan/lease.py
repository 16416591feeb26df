"""Which process works on which shards of a run in a folder: file locks, which end with a process.

Each task at work has a file next to `run.json`, whose own lock orders the tasks that come and go. A
file that no process holds was left by a process that was killed.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentguard.errors import UsageError

Task = tuple[int, int]
"""(K, N): the shards with number % N == K; (0, 1) are all of them."""

_NAME = re.compile(r"task-(\d{1,9})-of-(\d{1,9})\.lock")
_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_MAX_WHO = 400


class Lease:
    """The shards of a task, until `release` or the end of this process."""

    def __init__(self, gate: Path, path: Path, descriptor: int) -> None:
        self._gate, self._path, self._descriptor = gate, path, descriptor

    def check(self) -> None:
        """Nothing is to be checked: the lock lasts as long as this process."""

    def release(self) -> None:
        """Let others work on them. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            with suppress(OSError), _locked(self._gate):
                self._path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def hold(folder: Path, gate: Path, task: Task) -> Lease | None:
    """The lease on a task of the run in a folder.

    gate: a file there that is never replaced.
    None where the file system, or this machine, has no locks.

    Raises:
        UsageError: another process works on some of these shards.
        OSError: the folder cannot be written.
    """
    try:
        with _locked(gate):
            for name in overlapping((path.name for path in folder.glob("task-*.lock")), task):
                _remove_if_left(folder / name, folder)
            path = folder / task_file(task)
            descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o666)
            _lock(descriptor, wait=False)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return Lease(gate, path, descriptor)
    except _NoLocksError:
        return None


def task_file(task: Task) -> str:
    """The name of a task's file."""
    return f"task-{task[0]}-of-{task[1]}.lock"


def overlapping(names: Iterable[str], task: Task) -> list[str]:
    """Those of the names that are files of tasks which share a shard with this one."""
    found = [(name, _NAME.fullmatch(name)) for name in names]
    tasks = {name: (int(match[1]), int(match[2])) for name, match in found if match is not None}
    return [name for name, other in tasks.items() if other[1] and _overlap(task, other)]


def refusal(who: str, place: str | Path) -> str:
    """The sentence for whoever finds another process at work on the same shards."""
    return (
        f"{who} is at work on the run in {place}: let it end, or give each process its own shards "
        "(--task K/N)"
    )


def _overlap(one: Task, other: Task) -> bool:
    """Whether a number can be of both."""
    return (one[0] - other[0]) % math.gcd(one[1], other[1]) == 0


def _remove_if_left(path: Path, folder: Path) -> None:
    """Remove the file of a process that was killed. Raises UsageError for one that is at work."""
    descriptor = os.open(path, _FLAGS)
    try:
        if not _lock(descriptor, wait=False):
            said = os.read(descriptor, _MAX_WHO).decode("utf-8", "replace").strip()
            raise UsageError(refusal(said or "another process", folder))
        path.unlink()
    finally:
        os.close(descriptor)


class _NoLocksError(Exception):
    """There are no locks here."""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, _FLAGS)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Whether an open file is locked now, until it is closed. Raises _NoLocksError."""
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise _NoLocksError from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise _NoLocksError from error
        raise
    return True
