"""Which process works on which shards of a run on an object store, where there are no locks.

A task at work has a file next to `run.json`, which it writes anew every BEAT seconds. Whoever finds
the file of another task watches it: while its contents change that task is at work, and if they
stay the same for PATIENCE seconds its process was killed. So no clocks are compared. Of processes
of this machine it is known at once.

The Hugging Face Hub makes a commit of each writing, and allows some hundred an hour: there nothing
is held, as on file systems without locks.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentguard.errors import UsageError
from latentguard.files.addresses import shown
from latentguard.scan.lease import Task, overlapping, refusal, task_file
from latentguard.scan.store import Store, open_store

BEAT = 15.0
"""Seconds from one writing to the next."""

PATIENCE = 90.0
"""Seconds without a change after which a file was left. A beat is tried again for that long."""

_LOOK = 5.0

Tell = Callable[[str], None]
"""Told in one sentence what is waited for."""


class Beat:
    """The shards of a task, until `release` or the end of this process."""

    def __init__(self, store: Store, address: str, name: str) -> None:
        self._store, self._address, self._name = store, address, name
        self._place = shown(address)
        self._about = _about_this_process()
        self._count, self._last, self._lost = 0, time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="latentguard-beat")

    def begin(self, task: Task) -> None:
        """Take the task. Raises UsageError where another process has just taken its shards."""
        if not self._store.create(self._name, self._contents()):
            said = self._store.read(self._name)
            if not self._is_ours(said):  # else the answer to a first attempt was lost
                raise UsageError(refusal(_who(said), self._place))
        # Not every file system can refuse the second of two that write at the same moment.
        for other in overlapping(self._store.sizes(""), task):
            said = self._store.read(other)
            if said is not None and not self._is_ours(said):
                if other != self._name:
                    self._store.remove(self._name)
                raise UsageError(refusal(_who(said), self._place))
        self._thread.start()

    def check(self) -> None:
        """Raise UsageError where the shards may be another's by now: this process stood still, or
        could not reach the store, for longer than others wait."""
        if self._lost or time.monotonic() - self._last > PATIENCE:
            raise UsageError(
                f"the run at {self._place}: {self._name} was not renewed for more than "
                f"{PATIENCE:.0f} seconds or was taken over, so another process may be at work: let "
                "it end, and continue with --resume"
            )

    def release(self) -> None:
        """Let others work on them. A second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)
        with suppress(UsageError):  # then others wait for as long as if it had been killed
            if self._is_ours(self._store.read(self._name)):
                self._store.remove(self._name)

    def _renew(self) -> None:
        store: Store | None = None
        while not self._ended.wait(BEAT):
            with suppress(Exception):  # of the store, or a full disk: tried again, `check` knows
                # A connection of this thread's own: those of some file systems serve one.
                store = store or open_store(self._address)
                if not self._is_ours(store.read(self._name)):
                    self._lost = True
                    return
                self._count += 1
                store.write(self._name, self._contents())
                if store.read(self._name) == self._contents():
                    self._last = time.monotonic()

    def _contents(self) -> bytes:
        return json.dumps({**self._about, "count": self._count}).encode("ascii") + b"\n"

    def _is_ours(self, said: bytes | None) -> bool:
        return said is not None and _fields(said).get("token") == self._about["token"]


def hold_elsewhere(store: Store, address: str, task: Task, tell: Tell) -> Beat | None:
    """The lease on a task of a run on an object store; None where it cannot be held.

    Where a process of another machine left its file, this takes up to PATIENCE seconds.

    Raises:
        UsageError: another process works on some of these shards, or the store cannot be written.
    """
    if address.lower().startswith("hf://"):
        return None
    _outwait(store, shown(address), overlapping(store.sizes(""), task), tell)
    beat = Beat(store, address, task_file(task))
    beat.begin(task)
    return beat


def _outwait(store: Store, place: str, names: Iterable[str], tell: Tell) -> None:
    """Remove the files of processes that were killed. Raises UsageError for one at work."""
    watched = {}
    for name in names:
        said = store.read(name)
        if said is None:
            continue
        lives = _lives(_fields(said))
        if lives:
            raise UsageError(refusal(_who(said), place))
        if lives is None:
            watched[name] = said
        else:
            store.remove(name)
    if watched:
        who = ", ".join(_who(said) for said in watched.values())
        tell(
            f"{place} names {who}: waiting up to {PATIENCE:.0f} seconds to see whether it is still "
            "at work"
        )
    begun = time.monotonic()
    while watched:
        over = time.monotonic() - begun > PATIENCE
        for name, said in list(watched.items()):
            now = store.read(name)
            if now is not None and now != said:
                # Not every file system shows a file only once it is whole.
                raise UsageError(refusal(_who(now if _fields(now) else said), place))
            if now is None or over:
                del watched[name]
                store.remove(name)
        if watched:
            time.sleep(_LOOK)


# -- processes -------------------------------------------------------------------------------


def _about_this_process() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "began": _began(os.getpid()),
        "token": secrets.token_hex(16),
    }


def _lives(fields: dict[str, Any]) -> bool | None:
    """Whether the process that wrote a file still exists; None where that cannot be seen here."""
    machine, process = fields.get("machine"), fields.get("process")
    if machine is None or machine != _machine() or not isinstance(process, int):
        return None
    began = _began(process)
    if began is None and _may_exist(process):
        return None  # /proc may hide the processes of other users
    return began == fields.get("began")


def _may_exist(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _machine() -> str | None:
    """This boot of this machine, and the process numbers that are seen from here (Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _began(process: int) -> int | None:
    """When a process began, in ticks since the machine did; -1 of one that has ended, None where
    it is not seen (Linux)."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return -1 if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None


def _fields(said: bytes) -> dict[str, Any]:
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _who(said: bytes | None) -> str:
    fields = _fields(said or b"")
    process, host = fields.get("process"), fields.get("host")
    if isinstance(process, int) and isinstance(host, str):
        return f"process {process} on {host:.200}"
    return "another process"
