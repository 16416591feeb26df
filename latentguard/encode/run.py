"""From pictures to shards of latents in a folder: resumable, and divided among tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from latentguard.atomic import replacing
from latentguard.encode.encoding import Encoded, Encoding
from latentguard.encode.journal import Journal, Part
from latentguard.encode.samples import Problem, Sample
from latentguard.encode.shards import ShardWriter
from latentguard.encode.sources import Sources, Unit
from latentguard.errors import LatentsError

Advance = Callable[[int], None]
"""Called with how many more pictures are done."""


@dataclass(frozen=True)
class Task:
    """Which share of the work: number `number` of `of`, from 1. All tasks write one folder."""

    number: int = 1
    of: int = 1

    def has(self, unit: int, part: int) -> bool:
        """Whether a part is this task's. Parts go around, so that one large shard is shared."""
        return (unit + part) % self.of == self.number - 1


@dataclass(frozen=True)
class Outcome:
    """pictures: whose latents are written, by all tasks so far. problems: of those that are not."""

    pictures: int
    problems: list[Problem]
    shards: int


class ShardRun:
    """Encodes sources into a folder.

    shard_size: pictures of a shard, at most; also that of `find_sources`' groups.

    Raises as `Journal` does.
    """

    def __init__(
        self,
        out: Path,
        sources: Sources,
        encoding: Encoding,
        *,
        shard_size: int = 1000,
        task: Task | None = None,
        resume: bool = False,
        strict: bool = False,
    ) -> None:
        self._sources, self._encoding = sources, encoding
        self._size, self._strict = shard_size, strict
        self._task = task or Task()
        self._said = encoding.how.said(encoding.autoencoder)
        space = encoding.autoencoder.space
        about = {
            **self._said,
            "shard_size": shard_size,
            "sources": sources.sha256,
            "scale": space.scale,
            "shift": space.shift,
        }
        # Another task may have begun the folder.
        resume = resume or self._task.of > 1
        self._journal = Journal(
            out, about, resume=resume, task=self._task.number, alone=self._task.of == 1
        )
        if sources.classes:
            with replacing(out / "names.txt") as file:
                file.write("".join(f"{name}\n" for name in sources.classes).encode())

    def total(self) -> int | None:
        """Pictures of this task, as far as that is known without reading them."""
        found = 0
        for number, unit in enumerate(self._sources.units):
            count = unit.count()
            if count is None:
                return None
            for part in range(-(-count // self._size)):
                if self._task.has(number, part):
                    found += min(self._size, count - part * self._size)
        return found

    def done(self) -> int:
        """Pictures of this task that an earlier run has dealt with."""
        parts = self._journal.done.values()
        mine = [part for part in parts if self._task.has(part.unit, part.part)]
        return sum(part.pictures + len(part.problems) for part in mine)

    def run(self, advance: Advance = lambda count: None) -> Outcome:
        """Encode what is left. Raises LatentsError for the first problem where it is `strict`."""
        for number, unit in enumerate(self._sources.units):
            for part, samples in _parts(unit, self._size):
                key = (number, part)
                if self._task.has(*key) and key not in self._journal.done:
                    self._part(Part(number, part, 0, ()), samples, advance)
        parts = self._journal.read()
        problems = self._journal.problems(parts)
        pictures = sum(part.pictures for part in parts)
        return Outcome(pictures, problems, sum(part.pictures > 0 for part in parts))

    def _part(self, begun: Part, samples: Iterator[Sample | Problem], advance: Advance) -> None:
        problems: list[Problem] = []
        path = self._journal.folder / begun.shard
        with ShardWriter(path, self._said) as shard:
            for item in self._encoding.run(samples):
                if isinstance(item, Encoded):
                    shard.add(item)
                else:
                    problems.append(item)
                    if self._strict:
                        raise strict_error(item)
                advance(1)
        self._journal.note(Part(begun.unit, begun.part, shard.count, tuple(problems)))


def strict_error(problem: Problem) -> LatentsError:
    """Of a problem that ends the run."""
    return LatentsError(f"{problem.source}: {problem.error} (--strict)")


def _parts(unit: Unit, size: int) -> Iterator[tuple[int, Iterator[Sample | Problem]]]:
    """A unit's samples in parts of `size`; each part is read as it is asked for."""
    numbered = enumerate(unit.samples())
    for part, items in itertools.groupby(numbered, key=lambda pair: pair[0] // size):
        yield part, (sample for _, sample in items)
