"""Paths to files: folders and patterns become the latents files below them, in a stable order.

Nothing is passed over silently. A file that could hold latents but is not read, and a folder or
link that cannot be listed or followed, is Unreadable. The rest is counted. Links to folders are
followed after the real folders, and no folder is read twice, so a loop of links ends.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from latentguard.errors import LatentsError
from latentguard.files.mds import INDEX, SHARDS, missing_shards
from latentguard.files.passed_over import (
    HEAD,
    PassedOver,
    could_hold_latents,
    is_apple_double,
    is_harmless,
)
from latentguard.files.streams import open_regular

SUFFIXES = (
    ".pt", ".pth", ".safetensors", ".latent", ".npy", ".npz", ".tar", ".parquet", *SHARDS,
)  # fmt: skip
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
"""Files for `latentguard encode`, whose error says so."""
MISSING = "does not exist"
"""The error of a path that leads nowhere."""
COMPRESSED_SHARDS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Unreadable:
    """A path that cannot be read, and why: one sentence without the path."""

    source: str
    error: str


def expand(
    path: str | Path, passed: PassedOver, strict: bool = False
) -> Iterator[Path | Unreadable]:
    """The files that a path, a folder or a pattern means; at least one file or Unreadable.

    Args:
        passed: counts the files of folders that cannot hold latents.
        strict: whether each of these is an error, too.
    """
    text = os.fspath(path)
    found: Iterator[Path | Unreadable]
    try:
        if os.path.isdir(text):
            folders = _Folders(passed, strict, text)
            found = chain(folders.files(text), folders.linked_files())
            nothing = f"is a folder without latents files ({', '.join(SUFFIXES)})"
        elif glob.has_magic(text) and not os.path.lexists(text):
            found = _matches(text, passed, strict)
            nothing = "matches no file"
        else:
            found = iter([Path(text)] if os.path.lexists(text) else [])
            nothing = MISSING
    except (OSError, ValueError) as error:  # a NUL byte in the path is a ValueError
        yield Unreadable(text, f"cannot be opened: {error}")
        return
    empty = True
    for item in found:
        empty = False
        yield item
    if empty:
        yield Unreadable(text, nothing)


# -- folders ---------------------------------------------------------------------------------


@dataclass
class _Folder:
    """What a folder holds, sorted by name."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    broken: list[Unreadable] = field(default_factory=list)


class _Folders:
    """Walks folders and what is below them, each once however many links lead there."""

    def __init__(self, passed: PassedOver, strict: bool = False, root: str = "") -> None:
        self._passed, self._strict = passed, strict
        self._root = os.path.join(root, "") if root else ""
        self._seen: set[str] = set()
        self._links: deque[str] = deque()

    def files(self, folder: str) -> Iterator[Path | Unreadable]:
        """The latents files below a folder: its own, then those of each folder in it.

        Folders behind links come with `linked_files`, so that what is there without them keeps the
        name that it has without them.
        """
        for path_of, listed in self.below(folder):
            yield from listed.broken
            yield from _missing(path_of, listed)
            for path in listed.files:
                found = self._judged(path)
                if found is not None:
                    yield found

    def add_link(self, folder: str) -> None:
        """Read a folder that a link leads to with the others of its kind."""
        self._links.append(folder)

    def linked_files(self) -> Iterator[Path | Unreadable]:
        """The latents files behind the links met so far, and behind those met there."""
        while self._links:
            folder = self._links.popleft()
            if os.path.realpath(folder) in self._seen:
                self._passed.links += 1
            else:
                yield from self.files(folder)

    def below(self, folder: str, links: bool = False) -> Iterator[tuple[str, _Folder]]:
        """A folder and all below it, with `links` also those behind links, these last."""
        waiting = [folder]
        while waiting or (links and self._links):
            path = waiting.pop() if waiting else self._links.popleft()
            if not self._mark(path):
                continue
            try:
                listed = _listed(path)
            except OSError as error:
                yield path, _Folder(broken=[_unlisted(path, error)])
                continue
            waiting += reversed(listed.folders)
            self._links += listed.links
            yield path, listed

    def _mark(self, path: str) -> bool:
        """Whether a folder was not walked yet; from now on it is.

        Told by its path without links: numbers of inodes are not unique on every file system.
        """
        real = os.path.realpath(path)
        new = real not in self._seen
        self._seen.add(real)
        return new

    def _judged(self, path: str) -> Path | Unreadable | None:
        """A file that is read, or why it cannot be; None where it holds no latents."""
        name = os.path.basename(path)
        head = partial(_head_if_readable if is_harmless(name) else _head, path)
        try:
            if is_apple_double(name, head):
                return self._pass(path, name)
            if name.lower().endswith(SUFFIXES + COMPRESSED_SHARDS):
                return Path(path)
            if could_hold_latents(name, head):
                return Unreadable(
                    path,
                    "could hold latents, but its type cannot be read: known are "
                    f"{', '.join(SUFFIXES)}",
                )
        except (OSError, LatentsError) as error:
            return Unreadable(path, f"could hold latents, but {_reason(error)}")
        return self._pass(path, name)

    def _pass(self, path: str, name: str) -> Unreadable | None:
        self._passed.add_file(name, path.removeprefix(self._root))
        if not self._strict:
            return None
        return Unreadable(path, "is not a latents file, and with --strict no file is passed over")


def _missing(folder: str, listed: _Folder) -> Iterator[Unreadable]:
    """Shards that an index of MDS names, and that are not there. The index itself is read."""
    index = os.path.join(folder, INDEX)
    if index not in listed.files:
        return
    try:
        names = missing_shards(folder)
    except (OSError, LatentsError) as error:
        yield Unreadable(index, _reason(error))
        return
    if names is not None:
        listed.files.remove(index)
        for name in names:
            yield Unreadable(
                os.path.join(folder, name), "is named by index.json but does not exist"
            )


def _listed(folder: str) -> _Folder:
    """The entries of a folder. Raises OSError where it cannot be listed."""
    listed = _Folder()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = os.path.join(folder, entry.name)
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                # Also a link whose target is gone, which may have been a folder of latents.
                if is_harmless(entry.name):
                    listed.files.append(path)
                else:
                    listed.broken.append(Unreadable(path, _broken(entry, error)))
                continue
            if stat.S_ISDIR(mode):
                (listed.links if entry.is_symlink() else listed.folders).append(path)
            else:
                listed.files.append(path)
    return listed


def _broken(entry: os.DirEntry[str], error: OSError) -> str:
    if entry.is_symlink():
        return f"cannot be opened: its link leads nowhere ({error.strerror})"
    return f"cannot be opened: {error.strerror}"


def _unlisted(path: str, error: OSError) -> Unreadable:
    return Unreadable(path, f"is a folder that cannot be listed: {error.strerror or error}")


def _head(path: str) -> bytes:
    """The first bytes of a regular file; nothing of a FIFO or device, which holds no latents."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b""
    with open_regular(Path(path)) as stream:
        return stream.read(HEAD)


def _head_if_readable(path: str) -> bytes:
    """`_head`, nothing of a file that cannot be opened."""
    try:
        return _head(path)
    except (OSError, LatentsError):
        return b""


def _reason(error: Exception) -> str:
    return f"cannot be opened: {error.strerror}" if isinstance(error, OSError) else str(error)


# -- patterns --------------------------------------------------------------------------------


def _matches(pattern: str, passed: PassedOver, strict: bool) -> Iterator[Path | Unreadable]:
    """What matches a pattern, sorted, with `**` for any folders below; folders are searched."""
    drive, rest = os.path.splitdrive(pattern)
    root = drive + rest[: len(rest) - len(rest.lstrip("/" + os.sep))]
    parts = [part for part in rest.replace(os.sep, "/").split("/") if part]
    broken: dict[str, Unreadable] = {}
    found = [root]
    for part in parts:
        found = [path for base in found for path in _matching(base, part, broken)]
    yield from broken.values()
    if rest.endswith(("/", os.sep)):
        found = [path for path in found if os.path.isdir(path)]
    yield from _once(_files_of(sorted(set(found)), _Folders(passed, strict)))


def _files_of(matches: list[str], folders: _Folders) -> Iterator[Path | Unreadable]:
    for match in matches:
        if os.path.isdir(match) and os.path.islink(match):
            folders.add_link(match)
    for match in matches:
        if not os.path.isdir(match):
            yield Path(match)
        elif not os.path.islink(match):
            yield from folders.files(match)
    yield from folders.linked_files()


def _once(found: Iterator[Path | Unreadable]) -> Iterator[Path | Unreadable]:
    """Each file once: a pattern may match a folder and what is in it."""
    seen = set()
    for item in found:
        source = item.source if isinstance(item, Unreadable) else str(item)
        if source not in seen:
            seen.add(source)
            yield item


def _matching(base: str, part: str, broken: dict[str, Unreadable]) -> Iterator[str]:
    """What one part of a pattern matches below a path; what cannot be listed goes to `broken`."""
    here = base or os.curdir
    if part == "**":
        if os.path.isdir(here):
            for path, listed in _Folders(PassedOver()).below(here, links=True):
                broken.update({item.source: item for item in listed.broken if item.source == path})
                yield path if base else os.path.relpath(path)
        return
    try:
        if glob.has_magic(part):
            if os.path.isdir(here):
                names = fnmatch.filter(os.listdir(here), part)
                yield from (os.path.join(base, name) for name in names)
        else:
            os.lstat(os.path.join(base, part))
            yield os.path.join(base, part)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a NUL byte
        return
    except OSError as error:
        broken[here] = _unlisted(here, error)
