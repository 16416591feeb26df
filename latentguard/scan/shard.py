"""The unit of a run, and the function at its core: from one shard to a stream of records.

The rest of a run is a thin layer around `scan_shard`. Batches never span shards, so the records of
a shard are the same in any process and after any other shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Self

from latentguard.files import ArrayRecord, PassedOver
from latentguard.files.addresses import Remote, found, is_address, shown
from latentguard.files.mds import SHARDS
from latentguard.files.paths import MISSING, Unreadable
from latentguard.files.reading import read_file
from latentguard.files.remote import Noted
from latentguard.scan.judging import Judging, batches
from latentguard.scan.options import RunOptions
from latentguard.scan.record import ScanRecord
from latentguard.scan.sampling import Drawn, Reservoir

SMALL = 16 << 20
"""Bytes below which a file of a few images shares a shard with its neighbors."""

MAX_FILES = 1000
"""Files that share a shard, at most."""

MAX_BYTES = 256 << 20
"""Bytes of the files that share a shard, at most."""

_SHARDS = (".tar", ".parquet", *SHARDS)


@dataclass(frozen=True)
class Shard:
    """What is scanned as one, and whose records appear together or not at all.

    number: its place in the run, from 0. files: paths and addresses; small files come together.
    error: why there is nothing to read, where listing the paths said so.
    drawn: how it is part of a sample; None where all of it is looked at.
    """

    number: int
    files: tuple[str, ...]
    error: str | None = None
    drawn: Drawn | None = None

    @property
    def name(self) -> str:
        """Its first file, as records name it."""
        return shown(self.files[0])

    def to_json(self) -> str:
        """One line, as in a run's list of shards."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """What `to_json` wrote."""
        values = json.loads(line)
        drawn = values["drawn"]
        return cls(
            values["number"],
            tuple(values["files"]),
            values["error"],
            None if drawn is None else Drawn(**drawn),
        )


@dataclass
class Facts:
    """What is known of a shard once it has been read.

    noted: what its files were before they were read. passed: what could not be latents.
    images: how many it holds, where only some of them are looked at.
    reading: seconds that reading took, copies of remote files included.
    """

    noted: Noted = field(default_factory=Noted)
    passed: PassedOver = field(default_factory=PassedOver)
    images: int = 0
    reading: float = 0.0


def plan(
    paths: Iterable[str | Path] | str | Path, passed: PassedOver, strict: bool = False
) -> Iterator[Shard]:
    """The shards of paths and addresses, in their order: large files one by one, small ones
    together.

    passed, strict: as in `files.addresses.found`.
    """
    number, group, size = 0, list[str](), 0
    for file in found(paths, passed, strict):
        if isinstance(file, Unreadable):
            name, held = file.source, None
        elif isinstance(file, Remote):
            name, held = file.address, file.size
        else:
            name, held = str(file), _size(file)
        small = held is not None and held < SMALL and not name.lower().endswith(_SHARDS)
        if group and not (small and len(group) < MAX_FILES and size + (held or 0) <= MAX_BYTES):
            yield Shard(number, tuple(group))
            number, group, size = number + 1, [], 0
        if small:
            group.append(name)
            size += held or 0
            continue
        # What is missing now may be there when its turn comes, or when the run goes on.
        missing = isinstance(file, Unreadable) and file.error == MISSING
        error = file.error if isinstance(file, Unreadable) and not missing else None
        yield Shard(number, (name,), error)
        number += 1
    if group:
        yield Shard(number, tuple(group))


def read_shard(shard: Shard, options: RunOptions, facts: Facts) -> Iterator[list[ArrayRecord]]:
    """The images of a shard in batches, as they are judged; needs no model. Of a sample, those that
    are drawn.

    facts: told what the files were, and what was passed over.
    Raises OSError where this machine has no room for the copy of a remote file.
    """
    images = (_images if shard.drawn is None else _drawn)(shard, options, facts)
    found = batches(images, options.batch_size)
    while True:
        begun = perf_counter()
        batch = next(found, None)
        facts.reading += perf_counter() - begun
        if batch is None:
            return
        yield batch


def scan_shard(
    shard: Shard, options: RunOptions, judging: Judging, facts: Facts | None = None
) -> Iterator[list[ScanRecord]]:
    """The records of a shard, batch by batch: read, then judged. As `read_shard`."""
    for batch in read_shard(shard, options, Facts() if facts is None else facts):
        yield judging.judge(batch)


def unreadable(shard: Shard, error: str) -> list[ArrayRecord]:
    """A shard that could not be read, as one record."""
    return [ArrayRecord(shard.files[0], 0, None, None, error)]


def _images(shard: Shard, options: RunOptions, facts: Facts) -> Iterator[ArrayRecord]:
    if shard.error is not None:
        yield from unreadable(shard, shard.error)
        return
    for name in shard.files:
        file: Remote | Path | Unreadable = Remote(name) if is_address(name) else Path(name)
        if isinstance(file, Path) and not os.path.lexists(file):
            file = Unreadable(name, MISSING)
        yield from read_file(file, options.reading, facts.passed, facts.noted)


def _drawn(shard: Shard, options: RunOptions, facts: Facts) -> Iterator[ArrayRecord]:
    """The images of a shard that are in the sample. It is read twice: which ones they are is known
    once all have been counted, and so nothing else is judged or kept in memory."""
    assert shard.drawn is not None
    reservoir = Reservoir(shard.drawn.rows, shard.drawn.seed, shard.name)
    counted = Facts()
    for _ in _images(shard, options, counted):
        reservoir.offer()
    places, facts.images = set(reservoir.places), reservoir.seen
    for place, record in enumerate(_images(shard, options, facts)):
        if place in places:
            yield record
    facts.noted.copying += counted.noted.copying
    if facts.noted.states != counted.noted.states:
        facts.noted.states.clear()  # so that it is tried again
        yield from unreadable(shard, "changed while it was read: scan it again")


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
