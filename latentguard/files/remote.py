"""Files of other file systems, which are copied whole to this machine for the strict readers.

A copy counts only if the file was the same before and after it. Temporary failures (a server's 500,
a connection that ends) are tried again, with growing pauses.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from latentguard.errors import LatentsError
from latentguard.files.addresses import filesystem, is_address, said_of
from latentguard.files.mds import INDEX, SHARDS
from latentguard.files.scratch import scratch_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

MAX_COPY = 1 << 40
"""Bytes of one file."""

ATTEMPTS = 8
"""How often in a row something may fail before a file is given up."""

FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0
"""Seconds before the second attempt and, doubled each time, at most."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of this machine's own disk, which say nothing about a file that is read."""

_BLOCK = 8 << 20
_SPARE = 64 << 20
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}")
# Copies of index.json in this process, and what they are copies of.
_INDEXES: dict[Path, FileState] = {}
_INDEXING = threading.Lock()
# What does not get better by waiting.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_STATUS = range(400, 500)
_WORTH_A_TRY = (408, 425, 429)
_VERSIONS = ("etag", "ETag", "generation", "version_id", "sha256", "md5", "content_md5")
_TIMES = ("last_modified", "LastModified", "mtime", "created")


class _MissingError(LatentsError):
    """There is no such file."""


@dataclass(frozen=True)
class FileState:
    """What a file was when it was read.

    version: what its file system says that changes with its contents (an ETag; of files on this
    machine the times of change); empty where it says nothing.
    """

    size: int
    version: str


@dataclass
class Noted:
    """What reading files tells besides their records.

    states: of each file, before it was read, under its name in records. copying: seconds that
    copies of remote files took.
    """

    states: dict[str, FileState] = field(default_factory=dict)
    copying: float = 0.0


def state_of_path(path: Path) -> FileState:
    """Of a file on this machine. Raises OSError."""
    status = os.stat(path)
    return FileState(status.st_size, f"{status.st_mtime_ns}-{status.st_ctime_ns}")


def state_of_address(address: str) -> FileState:
    """Of a file of another file system. Raises LatentsError where it cannot be asked."""
    fs, path = filesystem(address)
    return _state(fs, path)


@contextmanager
def local_file(name: str, state: FileState | None = None) -> Iterator[Path]:
    """A file on this machine with the contents of a path or an address, while the block runs.

    Raises LatentsError as `copied` does, and where the file is not the one that had this state.
    """
    changed = LatentsError("changed since it was read: scan it again when nothing writes to it")
    if not is_address(name):
        if state is not None and state_of_path(Path(name)) != state:
            raise changed
        yield Path(name)
        if state is not None and state_of_path(Path(name)) != state:
            raise changed
        return
    with copied(name) as (path, now):
        if state is not None and now != state:
            raise changed
        yield path


@contextmanager
def copied(address: str) -> Iterator[tuple[Path, FileState]]:
    """A copy of a remote file under its own name, for as long as the block runs.

    Raises LatentsError where the file cannot be read, or changes meanwhile; OSError where this
    machine has no room for it.
    """
    fs, path = filesystem(address)
    state = _state(fs, path)
    with _place(fs, path) as place:
        copy = place / _name(path)
        try:
            _copy(fs, path, state, copy)
            yield copy, state
        finally:
            copy.unlink(missing_ok=True)


def _copy(fs: AbstractFileSystem, path: str, state: FileState, copy: Path) -> None:
    """Copy a file that must have this state, before and after."""
    if state.size > MAX_COPY:
        raise LatentsError(f"has {state.size:,} bytes, over the limit of {MAX_COPY:,}")
    free = shutil.disk_usage(copy.parent).free
    if state.size + _SPARE > free:
        why = f"no room for a copy of {state.size:,} bytes ({free:,} are free)"
        raise OSError(errno.ENOSPC, why, copy.parent)
    with copy.open("wb") as out:
        _fill(fs, path, state.size, out)
    if _state(fs, path) != state:
        raise LatentsError("changed while it was read: scan it again when nothing writes to it")


@contextmanager
def _place(fs: AbstractFileSystem, path: str) -> Iterator[Path]:
    """A folder for one copy. Shards of MosaicML share one, with the index.json beside them, which
    they have to agree with: it is copied and parsed once."""
    if not path.lower().endswith(SHARDS):
        place = scratch_folder() / f"{random.getrandbits(64):016x}"
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return
    folder = path.rpartition("/")[0]
    which = f"{fs.protocol} {folder}"
    place = scratch_folder() / hashlib.sha256(which.encode("utf-8", "replace")).hexdigest()[:16]
    place.mkdir(exist_ok=True)
    index = place / INDEX
    try:
        state = _state(fs, f"{folder}/{INDEX}")
    except _MissingError:
        index.unlink(missing_ok=True)
    else:
        with _INDEXING:
            if _INDEXES.get(index) != state or not index.exists():
                whole = index.with_name(f".{INDEX}.part")
                _copy(fs, f"{folder}/{INDEX}", state, whole)
                whole.replace(index)
                _INDEXES[index] = state
    yield place


def _name(path: str) -> str:
    """A plain name with the suffixes of the file, by which readers go; its own if that is plain."""
    name = path.partition("?")[0].rpartition("/")[2]
    if _PLAIN.fullmatch(name) and name != INDEX:
        return name
    _, dot, suffixes = name.partition(".")
    plain = "".join(c if c.isalnum() or c == "." else "_" for c in suffixes[-100:])
    return f"file{dot}{plain}"


def _state(fs: AbstractFileSystem, path: str) -> FileState:
    """Size and version, as the file system says them now."""

    def ask() -> dict[str, Any]:
        fs.invalidate_cache(path)
        info: dict[str, Any] = fs.info(path)
        return info

    info = retried(ask)
    if info.get("type") == "directory":
        raise LatentsError("is a folder")
    size = info.get("size")
    if not isinstance(size, int):
        raise LatentsError("is on a server that does not state the sizes of its files")
    said = [f"{key}={info[key]}" for key in _VERSIONS if info.get(key)]
    # A time alone tells less than an ETag; with one it only tells of a file that is written anew.
    said = said or [f"{key}={info[key]}" for key in _TIMES if info.get(key)]
    return FileState(size, " ".join(said))


def _fill(fs: AbstractFileSystem, path: str, size: int, out: IO[bytes]) -> None:
    """Copy `size` bytes, each block with its own attempts.

    Raises LatentsError where the file has more or fewer, OSError where `out` cannot take them.
    """
    while True:
        begun = out.tell()
        try:
            retried(lambda: _resume(fs, path, size, out), progress=out.tell)
        except OSError as error:
            if error.errno in FULL:
                raise OSError(error.errno, error.strerror, getattr(out, "name", None)) from error
            raise
        if out.tell() == size:
            return
        if out.tell() == begun:
            raise LatentsError(f"ended after {begun:,} of {size:,} bytes")


def _resume(fs: AbstractFileSystem, path: str, size: int, out: IO[bytes]) -> None:
    """Copy what is left, from where `out` stands; from the start where that cannot be had."""
    with closing(fs.open(path, "rb", block_size=_BLOCK, cache_type="none")) as source:
        if out.tell():
            if getattr(source, "seekable", lambda: False)():
                source.seek(out.tell())
            else:
                out.seek(0)
                out.truncate()
        while out.tell() < size:
            data = source.read(min(_BLOCK, size - out.tell()))
            if not data:
                return
            out.write(data)


def retried(action: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
    """What an action gives, tried again where it fails in passing.

    progress: what grows as the action gets on; as long as it does, attempts are counted anew.
    Raises LatentsError where it fails for good.
    """
    failures, reached = 0, progress()
    while True:
        try:
            return action()
        except Exception as error:  # each file system raises its own kinds
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if _is_lasting(error):
                raise _lasting(error) from error
            failures = 1 if progress() > reached else failures + 1
            reached = max(reached, progress())
            if failures >= ATTEMPTS:
                last = _root(error)
                raise LatentsError(
                    f"cannot be read: failed {ATTEMPTS} times ({said_of(last)})"
                ) from error
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1))
        time.sleep(longest * random.uniform(0.5, 1.0))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that caused it, at most a few."""
    following: BaseException | None = error
    for _ in range(8):
        if following is None:
            return
        yield following
        following = following.__cause__ or following.__context__


def _root(error: BaseException) -> BaseException:
    """The error that says most: a server's answer, where there is one."""
    return next((e for e in _chain(error) if _status(e) is not None), error)


def _status(error: BaseException) -> int | None:
    """What a server answered, as HTTP numbers it."""
    status = getattr(error, "status", None)
    if status is None:
        response = getattr(error, "response", None)
        about = response.get("ResponseMetadata") if isinstance(response, dict) else None
        status = about.get("HTTPStatusCode") if isinstance(about, dict) else None
    return status if isinstance(status, int) else None


def _is_lasting(error: BaseException) -> bool:
    """Whether it does not help to wait."""
    if isinstance(error, LatentsError):
        return True
    status = _status(_root(error))
    if status is not None:
        return status in _LASTING_STATUS and status not in _WORTH_A_TRY
    # fsspec calls a web server that it cannot reach a file that is not there.
    reached = not any(isinstance(e, (ConnectionError, TimeoutError)) for e in _chain(error))
    return isinstance(error, _LASTING) and reached


def _lasting(error: Exception) -> LatentsError:
    if isinstance(error, LatentsError):
        return error
    if isinstance(error, FileNotFoundError) or _status(_root(error)) in (404, 410):
        return _MissingError("does not exist")
    if isinstance(error, PermissionError) or _status(_root(error)) in (401, 403):
        return LatentsError("cannot be opened: permission denied")
    return LatentsError(f"cannot be opened: {said_of(error)}")
