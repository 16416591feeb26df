"""Paths that are more than paths: addresses of other file systems, and ranges in braces.

`found` turns each of them into files. A path is searched by paths.py. An address
(`s3://bucket/shards/`, `hf://datasets/...`) is searched in the same way, by fsspec.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentguard.errors import LatentsError, MissingExtraError
from latentguard.files.bounds import MAX_MDS_INDEX
from latentguard.files.mds import INDEX, missing_of
from latentguard.files.passed_over import (
    HEAD,
    PassedOver,
    could_hold_latents,
    is_apple_double,
    is_harmless,
)
from latentguard.files.paths import COMPRESSED_SHARDS, SUFFIXES, Unreadable, expand
from latentguard.text import first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MAX_RANGE = 10_000_000
"""Addresses that the braces of one may stand for."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]*)?://")
_BRACES = re.compile(r"\{([^{}]*)\}")
# Of an address in a sentence: what stands before its host, and behind its path.
_CARRIED = re.compile(r"(https?://)(?:[^\s'\"/@]*@)?([^\s'\"?#]*)[^\s'\"]*")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_NEEDED = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp"}
_NO_FOLDERS = ("http", "https")


@dataclass(frozen=True)
class Remote:
    """A file of another file system. size: in bytes, where a listing said it."""

    address: str
    size: int | None = None


def is_address(path: str | Path) -> bool:
    """Whether this is an address of a file system (`s3://...`), and not a path."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def shown(address: str) -> str:
    """An address as it may stand in a record: without the password or signature that it carries."""
    scheme = _SCHEME.match(address)
    if scheme is None:
        return address
    host, slash, path = address[scheme.end() :].partition("/")
    if scheme[1].lower() in _NO_FOLDERS:
        path = path.partition("?")[0].partition("#")[0]
    return f"{scheme[0]}{host.rpartition('@')[2]}{slash}{path}"


def said_of(error: BaseException) -> str:
    """What an error of a file system says, on one line and without what addresses carry."""
    line = first_line(error, type(error).__name__)
    return _CARRIED.sub(r"\1\2", line)


def found(
    paths: Iterable[str | Path] | str | Path, passed: PassedOver, strict: bool = False
) -> Iterator[Path | Remote | Unreadable]:
    """The files that paths and addresses stand for; at least one, or an Unreadable, for each.

    passed, strict: as in `paths.expand`.
    """
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        try:
            for one in _braces(path):
                local = _local(one)
                if local is None:
                    yield from _remote(str(one), passed, strict)
                else:
                    yield from expand(local, passed, strict)
        except LatentsError as error:
            yield Unreadable(shown(str(path)), str(error))


def filesystem(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path in it.

    Raises MissingExtraError where fsspec is missing, LatentsError for a file system that is not
    known, or cannot be used.
    """
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{shown(address)} needs fsspec, which is not installed: "
            "pip install 'latentguard[scale]'"
        ) from error
    if "::" in address:
        raise LatentsError("is a chain of file systems, which cannot be read: give the file itself")
    scheme = address.partition("://")[0].lower()
    try:
        fs, path = url_to_fs(address)
    except ImportError as error:
        raise MissingExtraError(
            f"{scheme}:// needs {_NEEDED.get(scheme, 'another package')}: {said_of(error)}"
        ) from error
    except Exception as error:  # each file system raises its own kinds
        raise LatentsError(f"cannot be opened: {said_of(error)}") from error
    return fs, path


# -- braces ----------------------------------------------------------------------------------


def _braces(path: str | Path) -> Iterator[str | Path]:
    """`{00..99}` and `{a,b}` written out; a file that has this very name comes first."""
    if not isinstance(path, str) or not _BRACES.search(path):
        yield path
        return
    if not is_address(path) and os.path.lexists(path):
        yield path
        return
    texts = _BRACES.split(path)
    choices: list[list[str] | _Numbers] = [
        _choices(text) if n % 2 else [text] for n, text in enumerate(texts)
    ]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_RANGE:
        raise LatentsError(f"stands for {count:,} files, over the limit of {MAX_RANGE:,}")
    for parts in itertools.product(*choices):
        yield "".join(parts)


def _choices(text: str) -> list[str] | _Numbers:
    bounds = _RANGE.fullmatch(text)
    if bounds is None:
        return text.split(",") if "," in text else [f"{{{text}}}"]
    first, last = int(bounds[1]), int(bounds[2])
    if last < first:
        raise LatentsError(f"has a range that ends before it begins: {{{text}}}")
    return _Numbers(first, last, len(bounds[1]))


@dataclass(frozen=True)
class _Numbers:
    """first ... last, with at least `digits` digits."""

    first: int
    last: int
    digits: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Iterator[str]:
        return (str(n).zfill(self.digits) for n in range(self.first, self.last + 1))


# -- other file systems ----------------------------------------------------------------------


def _local(path: str | Path) -> str | Path | None:
    """The path that this is, `file://` included; None for another file system."""
    if not is_address(path):
        return path
    text = str(path)
    if text.lower().startswith(("file://", "local://")):
        rest = text.partition("://")[2]
        return rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    return None


def _remote(address: str, passed: PassedOver, strict: bool) -> Iterator[Remote | Unreadable]:
    scheme = address.partition("://")[0].lower()
    name = shown(address)
    if scheme in _NO_FOLDERS:
        yield Remote(address)
        return
    fs, path = filesystem(address)
    magic = any(c in path for c in "*?[")
    if not magic and path.lower().endswith((*SUFFIXES, *COMPRESSED_SHARDS)):
        yield Remote(address)  # no question to a server for each of a hundred thousand shards
        return
    try:
        fs.invalidate_cache()
        if magic:
            matches: dict[str, Any] = fs.glob(path, detail=True)
            entries, nothing = _below(fs, matches), "matches no file"
        elif (info := fs.info(path))["type"] == "directory":
            nothing = f"is a folder without latents files ({', '.join(SUFFIXES)})"
            entries = _below(fs, {path: info})
        else:
            yield Remote(address, info.get("size"))
            return
        empty = True
        for missing in _missing(fs, entries):
            empty = False
            yield missing
        for entry, info in entries.items():
            one = _judged(fs, entry, info, passed)
            if one is None and strict and not entry.endswith("/"):
                said = "is not a latents file, and with --strict no file is passed over"
                one = Unreadable(shown(fs.unstrip_protocol(entry)), said)
            if one is not None:
                empty = False
                yield one
    except FileNotFoundError:
        yield Unreadable(name, "does not exist")
    except Exception as error:  # each file system raises its own kinds
        yield Unreadable(name, f"cannot be listed: {said_of(error)}")
    else:
        if empty:
            yield Unreadable(name, nothing)


def _below(fs: AbstractFileSystem, matches: dict[str, Any]) -> dict[str, Any]:
    """Files and those below folders, each once, sorted by name."""
    files: dict[str, Any] = {}
    for path, info in matches.items():
        if info["type"] == "directory":
            files |= fs.find(path, detail=True)
        else:
            files[path] = info
    return {path: files[path] for path in sorted(files)}


def _missing(fs: AbstractFileSystem, entries: dict[str, Any]) -> Iterator[Unreadable]:
    """Shards that an index of MDS among these files names, and that are not there. The index itself
    is read, and taken from the entries."""
    for path in [path for path in entries if path.rpartition("/")[2] == INDEX]:
        folder = path.removesuffix(INDEX)
        there = {name.removeprefix(folder) for name in entries if name.startswith(folder)}
        try:
            size = entries[path].get("size") or 0
            names = missing_of(fs.cat_file(path, start=0, end=min(size, MAX_MDS_INDEX + 1)), there)
        except Exception as error:  # each file system raises its own kinds
            said = str(error) if isinstance(error, LatentsError) else said_of(error)
            yield Unreadable(shown(fs.unstrip_protocol(path)), f"cannot be read: {said}")
            continue
        if names is not None:
            del entries[path]
            for name in names:
                source = shown(fs.unstrip_protocol(folder + name))
                yield Unreadable(source, "is named by index.json but does not exist")


def _judged(
    fs: AbstractFileSystem, path: str, info: dict[str, Any], passed: PassedOver
) -> Remote | Unreadable | None:
    """A file that is read, or why it cannot be; None where it holds no latents."""
    size, name = info.get("size"), path.rpartition("/")[2]
    address = fs.unstrip_protocol(path)
    if path.endswith("/") and not size:
        return None  # what stands for a folder in an object store
    head = partial(_head, fs, path, size or 0)
    try:
        if is_apple_double(name, head):
            passed.add_file(name, shown(address))
            return None
        if name.lower().endswith((*SUFFIXES, *COMPRESSED_SHARDS)):
            return Remote(address, size)
        # The name of a text is believed: its first bytes would be one more question to a server.
        if not is_harmless(name) and could_hold_latents(name, head):
            return Unreadable(
                shown(address),
                f"could hold latents, but its type cannot be read: known are {', '.join(SUFFIXES)}",
            )
    except Exception as error:  # each file system raises its own kinds
        said = said_of(error)
        return Unreadable(shown(address), f"could hold latents, but cannot be opened: {said}")
    passed.add_file(name, shown(address))
    return None


def _head(fs: AbstractFileSystem, path: str, size: int) -> bytes:
    data: bytes = fs.cat_file(path, start=0, end=min(HEAD, size)) if size else b""
    return data
