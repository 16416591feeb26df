"""The output of one shard while it is written. Nothing of it is in the run before `commit`."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import time

import latentguard
from latentguard.files.addresses import shown
from latentguard.files.remote import local_file
from latentguard.files.scratch import scratch_folder
from latentguard.regular import open_regular, sha256_of
from latentguard.scan.entry import Entry, Written
from latentguard.scan.judges import Judges
from latentguard.scan.keep import Decisions, copy_kept
from latentguard.scan.options import RunOptions
from latentguard.scan.record import ScanRecord
from latentguard.scan.sampling import ClusterSample
from latentguard.scan.schema import Numbering
from latentguard.scan.shard import Facts, Shard
from latentguard.scan.sinks import SUFFIXES, open_sink
from latentguard.scan.store import Store
from latentguard.scan.tally import Tally
from latentguard.scan.tally_file import tally_bytes

PARTS, ENTRIES, TALLIES, QUARANTINE, KEPT = "parts", "manifest", "tallies", "quarantine", "kept"
"""Folders of a run."""
FOLDERS = (ENTRIES, PARTS, TALLIES, QUARANTINE, KEPT)


def stem(shard: Shard) -> str:
    """What the files of a shard are called: its number, and a hint at its name."""
    name = shard.name.rpartition("/")[2].partition(".")[0]
    hint = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
    return f"{shard.number:06d}-{hint}" if hint else f"{shard.number:06d}"


def entry_name(number: int) -> str:
    """The manifest's file of a shard."""
    return f"{ENTRIES}/{number:06d}.json"


class Unit:
    """Takes the records of a shard in order, and commits them together.

    Raises OSError where the disk is full, from any method.
    """

    def __init__(self, store: Store, shard: Shard, options: RunOptions, judges: Judges) -> None:
        self._store, self._shard, self._options = store, shard, options
        self._judges = judges
        self._tally = Tally()
        self._stack = ExitStack()
        self._began = time()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(dir=scratch_folder()))
        self._part = Path(folder) / f"part{SUFFIXES[options.sink]}"
        self._sink = open_sink(options.sink, self._part)
        self._numbering = Numbering()
        self._decisions = Decisions()
        self._problems = self._part.with_name("quarantine.jsonl")
        self._outcomes: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._models: dict[str, tuple[str, str]] = {}
        self._scoring = 0.0

    def add(self, records: Sequence[ScanRecord], seconds: float = 0.0) -> None:
        """The next records of the shard. seconds: what judging them took."""
        self._scoring += seconds
        self._sink.add([self._numbering.row(record) for record in records])
        problems = [_problem(record) for record in records if record.failed]
        if problems:
            with self._problems.open("a", encoding="ascii") as file:
                file.writelines(problems)
        for record in records:
            self._tally.add(record)
            self._outcomes[record.outcome] += 1
            self._verdicts[record.verdict.decision] += 1
            if record.model is not None and record.space is not None:
                self._models[record.space] = (record.model.name, record.model.sha256)
            if self._options.keep is not None:
                self._decisions.add(record)

    def commit(self, facts: Facts) -> Entry:
        """Put everything where it belongs, the manifest's entry last.

        Raises LatentsError where the samples to keep can no longer be read from the shard.
        """
        kept = self._keep(facts)
        self._sink.close()
        name = f"{PARTS}/{stem(self._shard)}{SUFFIXES[self._options.sink]}"
        part = self._put(name, self._part, self._outcomes.total())
        quarantine = None
        if self._outcomes["error"]:
            name = f"{QUARANTINE}/{stem(self._shard)}.jsonl"
            quarantine = self._put(name, self._problems, self._outcomes["error"])
        images = max(facts.images, self._outcomes.total())
        tally = self._put_tally(facts, images)
        entry = Entry(
            number=self._shard.number,
            files=tuple(shown(name) for name in self._shard.files),
            states=facts.noted.states,
            part=part,
            tally=tally,
            images=images,
            outcomes=self._outcomes,
            decisions=self._verdicts,
            models=self._models,
            passed=facts.passed,
            quarantine=quarantine,
            kept=kept,
            microseconds=self._tally.microseconds,
            version=latentguard.__version__,
        )
        self._store.write(entry_name(self._shard.number), entry.to_json())
        self.abandon()
        return entry

    def _put_tally(self, facts: Facts, images: int) -> Written:
        tally, copying = self._tally, facts.noted.copying
        for info in self._judges.models:
            if self._models.get(info.space) == tuple(info.id):
                tally.note_model(info)
        tally.add_seconds(copying, max(0.0, facts.reading - copying), self._scoring)
        tally.bytes_read = sum(state.size for state in facts.noted.states.values())
        tally.add_span(self._began, time())
        drawn = self._shard.drawn
        if drawn is not None:
            sample = ClusterSample(drawn.of, drawn.rows, drawn.seed)
            tally.sample = sample.with_shard(self._shard.name, images, self._outcomes)
        path = self._part.with_name("tally.json")
        path.write_bytes(tally_bytes(tally))
        return self._put(f"{TALLIES}/{self._shard.number:06d}.json", path, tally.images)

    def abandon(self) -> None:
        """Forget what was added."""
        self._sink.abandon()
        self._stack.close()

    def _put(self, name: str, path: Path, rows: int) -> Written:
        with open_regular(path) as source:
            digest, size = sha256_of(source), os.fstat(source.fileno()).st_size
            source.seek(0)
            with self._store.writing(name) as target, target.open("wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)
        return Written(name, size, digest, rows)

    def _keep(self, facts: Facts) -> Written | None:
        """The copy of the samples with one decision; None if there are none."""
        keep = self._options.keep
        if keep is None or self._verdicts[keep] == 0:
            return None
        copy = self._part.with_name("kept.tar")
        (name,) = self._shard.files
        with local_file(name, facts.noted.states.get(shown(name))) as shard, copy.open("xb") as out:
            chosen = self._options.reading.member is not None
            count = copy_kept(shard, self._decisions.members, keep, out, chosen)
        if count == 0:
            return None
        return self._put(f"{KEPT}/{stem(self._shard)}.tar", copy, count)


def _problem(record: ScanRecord) -> str:
    """A line of a quarantine file."""
    said = {
        "source": record.source,
        "index": record.index,
        "id": record.id,
        "error": record.verdict.error,
    }
    return json.dumps(said, ensure_ascii=True) + "\n"
