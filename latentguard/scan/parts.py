"""What a run left, as one tally: run folders, part files, and the tallies of others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from latentguard.errors import UsageError
from latentguard.files.addresses import is_address
from latentguard.judge import PolicyId, Verdict
from latentguard.regular import open_regular, problem
from latentguard.scan.entry import SCHEMA_VERSION
from latentguard.scan.record import ScanRecord
from latentguard.scan.schema import need_pyarrow, with_schemes
from latentguard.scan.store import Store, open_store
from latentguard.scan.tally import KIND, Tally
from latentguard.scan.unit import ENTRIES
from latentguard.text import first_line

MAX_JSON = 1 << 29
"""Bytes of a tally."""

MAX_LINE = 1 << 26
"""Bytes of one record."""


@dataclass
class Collected:
    """The sum of all parts.

    shards: done, of run folders. quarantine: the files that name what could not be read or judged,
    with the number of images in each.
    """

    tally: Tally = field(default_factory=Tally)
    shards: int = 0
    quarantine: list[tuple[str, int]] = field(default_factory=list)


def collect(parts: Iterable[str | Path]) -> Collected:
    """Read parts: folders and addresses of runs, `.jsonl` and `.parquet` files of records, `.json`
    tallies.

    Raises UsageError, which names the part, for what cannot be read, is given twice, or cannot be
    counted as one with the parts before it.
    """
    collected, seen = Collected(), set[str]()
    for part in map(str, parts):
        real = part if is_address(part) else os.path.realpath(part)
        if real in seen:
            raise UsageError(f"{part} is given twice, and would be counted twice")
        seen.add(real)
        try:
            if is_address(part) or os.path.isdir(part):
                _add_run(collected, part)
            else:
                collected.tally.merge(_tally_of(Path(part)))
        except UsageError:
            raise
        except OSError as error:
            raise UsageError(f"{error.filename or part} {problem(error)}") from error
        except ValueError as error:
            raise UsageError(f"{part}: {error}") from error
    return collected


def read_records(path: Path) -> Iterator[ScanRecord]:
    """The records of a part file. Raises ValueError for what is none, OSError."""
    rows = _json_rows(path) if path.suffix.lower() == ".jsonl" else _parquet_rows(path)
    for number, row in enumerate(rows, start=1):
        try:
            yield record_of(row)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error


def record_of(row: Any) -> ScanRecord:
    """The record that `ScanRecord.to_dict` gave; further keys are left alone.

    Raises ValueError for anything else.
    """
    if not isinstance(row, Mapping):
        raise ValueError("must be an object")
    source, index, space = row.get("source"), row.get("index"), row.get("space")
    name, policy = row.get("id"), row.get("policy")
    if not isinstance(source, str) or type(index) is not int or index < -1:
        raise ValueError("must have a source and an index")
    if not isinstance(name, str | None) or not isinstance(space, str | None):
        raise ValueError("id and space must be text or null")
    if not isinstance(policy, Mapping):
        raise ValueError("must name its policy")
    said = [policy.get(key) for key in PolicyId._fields]
    if not all(isinstance(value, str) for value in said):
        raise ValueError("policy must have a name, a version and a sha256")
    return ScanRecord(source, index, name, space, Verdict.from_dict(row), PolicyId(*map(str, said)))


# -- part files ------------------------------------------------------------------------------


def _tally_of(path: Path) -> Tally:
    suffix = path.suffix.lower()
    if suffix == ".json":
        data = _json(path)
        if isinstance(data, Mapping) and data.get("kind") != KIND:
            raise ValueError(f"is not a tally (its kind is not {KIND}); records are .jsonl")
        return Tally.from_dict(data)
    if suffix not in (".jsonl", ".parquet"):
        raise ValueError("must be a run folder, or end in .jsonl, .parquet or .json")
    tally = Tally()
    for record in read_records(path):
        tally.add(record)
    return tally


def _json(path: Path) -> Any:
    with open_regular(path) as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise ValueError(f"is larger than {MAX_JSON:,} bytes")
    return _parsed(data)


def _json_rows(path: Path) -> Iterator[Any]:
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise ValueError(f"has a line of more than {MAX_LINE:,} bytes")
            if line.strip():
                yield _parsed(line)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _parquet_rows(path: Path) -> Iterator[Any]:
    need_pyarrow()
    from pyarrow import ArrowException, parquet

    with open_regular(path) as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield with_schemes(_without_nulls(row))
        except ArrowException as error:
            raise ValueError(f"cannot be read as Parquet: {first_line(error)}") from error


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A threshold's margin is a column of its own in Parquet, and empty where there is none."""
    for concept in row.get("concepts") or ():
        threshold = concept.get("threshold") if isinstance(concept, dict) else None
        if isinstance(threshold, dict) and threshold.get("margin", 0) is None:
            del threshold["margin"]
    return row


# -- run folders -----------------------------------------------------------------------------


def _add_run(collected: Collected, place: str) -> None:
    """Each shard by its entry in the manifest: its tally, or else its part file."""
    store = open_store(place)
    names = sorted(name for name in store.sizes(ENTRIES) if name.endswith(".json"))
    if not names:
        raise ValueError(f"is not a run with finished shards: there is nothing in {ENTRIES}/")
    for name in names:
        try:
            entry = _parsed(store.read(f"{ENTRIES}/{name}") or b"")
            if not isinstance(entry, Mapping):
                raise ValueError("is not an entry of a manifest")
            version = entry.get("schema_version", SCHEMA_VERSION)
            if version != SCHEMA_VERSION:
                raise ValueError(
                    f"is of another version of latentguard (its schema_version is {version!r}, not "
                    f"{SCHEMA_VERSION}): report it with that version"
                )
            collected.tally.merge(_tally_of_entry(store, place, entry))
            quarantine = entry.get("quarantine")
            if quarantine is not None:
                rows = quarantine.get("rows") if isinstance(quarantine, Mapping) else None
                shown = f"{place.rstrip('/')}/{_inside(quarantine)}"
                collected.quarantine.append((shown, rows if type(rows) is int else 0))
        except ValueError as error:
            raise ValueError(f"{ENTRIES}/{name}: {error}") from error
        collected.shards += 1


def _tally_of_entry(store: Store, place: str, entry: Mapping[str, Any]) -> Tally:
    told = entry.get("tally")
    if told is not None:
        return _tally_written(store, told)
    part = _inside(entry.get("part"))
    if is_address(place):
        raise ValueError(f"has no tally: copy {part} here, and report that")
    return _tally_of(Path(place) / part)


def _tally_written(store: Store, written: Any) -> Tally:
    """The tally in a file of its own, if that is the file that the entry names."""
    name = _inside(written)
    data = store.read(name)
    if data is None:
        raise ValueError(f"{name} is missing: --resume of the run writes it again")
    if (len(data), sha256(data).hexdigest()) != (written.get("size"), written.get("sha256")):
        raise ValueError(
            f"{name} was changed after it was written: --resume of the run writes it again"
        )
    return Tally.from_dict(_parsed(data))


def _inside(written: Any) -> str:
    """The file that an entry names. Raises ValueError for one outside of the run's folder."""
    name = written.get("name") if isinstance(written, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError("has neither a tally nor a part")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"names a file outside its run: {name}")
    return name
