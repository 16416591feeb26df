"""The record of a run in its folder: its options, the finished shards, and the problems."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentguard.atomic import replacing
from latentguard.encode.samples import Problem
from latentguard.errors import LatentsError, UsageError

SCHEMA_VERSION = 1
_ABOUT = "encode.json"
PROBLEMS = "problems.jsonl"
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.part")  # atomic.py's
_ABANDONED = 24 * 3600.0
_READ = "pictures"
"""The beginning of the files' names in which each task notes what it has done."""


@dataclass(frozen=True)
class Part:
    """A part of a unit that is done: so many pictures in its shard, and its problems."""

    unit: int
    part: int
    pictures: int
    problems: tuple[Problem, ...]

    @property
    def shard(self) -> str:
        """Its file, which is not there where it has no pictures."""
        return f"{self.unit:06d}-{self.part:04d}.tar"


class Journal:
    """A run's folder. `done` are the parts that every task so far has finished."""

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        *,
        resume: bool,
        task: int = 1,
        alone: bool = True,
    ) -> None:
        """Begin a run, or continue the one in the folder.

        about: all that decides what is written; a folder of another run is an error.
        resume: whether the folder may hold a run.
        task: the number of this one, from 1. alone: whether there are no others.

        Raises:
            UsageError: the folder holds a run and `resume` is False, or it holds other files.
            LatentsError: it is a run of other pictures or options.
        """
        self.folder = folder
        self._log = folder / f"{_READ}-{task}.jsonl"
        about = {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(about))}
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / _ABOUT
        if manifest.exists():
            _same(manifest, about)
            if not resume:
                raise UsageError(f"{folder} already holds this run: --resume continues it")
            _tidy(folder, alone)
        else:
            if any(folder.glob("*.tar")):
                raise UsageError(f"{folder} holds shards of something else: give another folder")
            with replacing(manifest) as file:
                file.write(json.dumps(about, indent=1).encode())
        self.done = {(part.unit, part.part): part for part in self.read()}

    def note(self, part: Part) -> None:
        """A part is done: its shard is in its place."""
        line = {
            "unit": part.unit,
            "part": part.part,
            "pictures": part.pictures,
            "problems": [problem.to_dict() for problem in part.problems],
        }
        with self._log.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # What a run that was killed left of a line must not swallow this one.
                torn = file.read(1) != b"\n"
                file.write(b"\n" if torn else b"")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[part.unit, part.part] = part

    def read(self) -> list[Part]:
        """What all tasks have done so far, in the order of the pictures.

        A part whose shard has gone is not done.
        """
        found = {(part.unit, part.part): part for part in self._noted()}
        return [
            part
            for _, part in sorted(found.items())
            if not part.pictures or (self.folder / part.shard).is_file()
        ]

    def problems(self, parts: Sequence[Part]) -> list[Problem]:
        """Those of the parts; also written to problems.jsonl, where there are any."""
        found = [problem for part in parts for problem in part.problems]
        target = self.folder / PROBLEMS
        if found or target.exists():
            write_problems(target, found)
        return found

    def _noted(self) -> Iterator[Part]:
        for log in sorted(self.folder.glob(f"{_READ}-*.jsonl")):
            for line in log.read_bytes().splitlines():
                try:
                    yield _part(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    continue  # torn: its part is encoded again


def _tidy(folder: Path, alone: bool) -> None:
    """Remove half-written files of processes that were killed; those of others may be in use."""
    for path in folder.glob(".*.part"):
        with suppress(OSError):
            if _PARTIAL.fullmatch(path.name) and (
                alone or time.time() - path.stat().st_mtime > _ABANDONED
            ):
                path.unlink()


def write_problems(path: Path, problems: list[Problem]) -> None:
    """One JSON object a line: source, id, error."""
    with replacing(path) as file:
        for problem in problems:
            file.write(json.dumps(problem.to_dict()).encode() + b"\n")


def _part(values: dict[str, Any]) -> Part:
    problems = tuple(Problem(p["source"], p["error"], p["id"]) for p in values["problems"])
    return Part(int(values["unit"]), int(values["part"]), int(values["pictures"]), problems)


def _same(manifest: Path, about: dict[str, Any]) -> None:
    try:
        found = json.loads(manifest.read_bytes())
    except (OSError, ValueError) as error:
        raise LatentsError(f"{manifest}: cannot be read ({error}); give another folder") from error
    if not isinstance(found, dict):
        raise LatentsError(f"{manifest}: is not the record of a run; give another folder")
    for key in sorted(about.keys() | found.keys()):
        if found.get(key) != about.get(key):
            raise LatentsError(
                f"{manifest}: {key} is {found.get(key)!r:.100}, but this run has "
                f"{about.get(key)!r:.100}; give another folder"
            )
