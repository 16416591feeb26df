"""Folders: the pictures, shards and tables below them, in a stable order, each once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentguard.encode.pictures import SUFFIXES
from latentguard.encode.samples import Problem
from latentguard.errors import LatentsError

CONTAINERS = (".tar", ".parquet", ".arrow")
BESIDE = (".txt", ".caption")
"""What holds the caption of a picture, under its name."""


class PassedOver:
    """Counts files of folders that are not read, by suffix."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, path: Path) -> None:
        """One more."""
        self.counts[path.suffix.lower()[:12] or "no suffix"] += 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {suffix}" for suffix, count in self.counts.most_common(8))


def walk(folder: Path, passed: PassedOver) -> Iterator[Path | Problem]:
    """The picture files, shards and tables below a folder, sorted by name, folder by folder.

    Links are followed; a folder that several lead to is walked once. What cannot be listed is a
    Problem. Captions beside pictures are part of them.
    """
    waiting, seen = [folder], set()
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(here.iterdir())
        except OSError as error:
            yield Problem(str(here), f"is a folder that cannot be listed: {error.strerror}")
            continue
        pictures = {path.stem for path in entries if _is_picture(path)}
        waiting += reversed([path for path in entries if path.is_dir()])
        for path in entries:
            if path.is_dir():
                continue
            if _is_picture(path) or path.suffix.lower() in CONTAINERS:
                yield path
            elif path.suffix.lower() not in BESIDE or path.stem not in pictures:
                passed.add(path)


def _is_picture(path: Path) -> bool:
    # macOS leaves ._x.jpg beside x.jpg, which is none.
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._")


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """All picture files of the paths, files or folders, sorted.

    Raises LatentsError: a path that is not there, a folder that cannot be listed, no pictures.
    """
    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            for item in walk(given, PassedOver()):
                if isinstance(item, Problem):
                    raise LatentsError(f"{item.source} {item.error}")
                found += [item] if _is_picture(item) else []
        elif given.exists():
            found += [given] if _is_picture(given) else []
        else:
            raise LatentsError(f"no such image folder: {given}")
    if not found:
        names = ", ".join(map(str, paths))
        raise LatentsError(f"no images ({', '.join(SUFFIXES)}) under {names}")
    return sorted(found)
