"""A run: many shards, each scanned exactly once, in a folder that another process can continue.

    run.json             what the run is: policy, model, everything that bears on verdicts
    shards-HASH.jsonl    the shards, one a line, in their order
    parts/               the records of each shard, in one file
    tallies/             the counts of each shard, for reports
    manifest/            one file for each finished shard, written last
    quarantine/          the images of each shard that could not be read or judged, and why
    kept/                with `keep`, the copy of each shard's samples

A shard is done if its file in the manifest exists and agrees with the other files. Other files that
a killed process left are not part of the run, and are removed when the run continues or ends. One
process at a time works on a shard (lease.py, and beat.py on object stores).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import latentguard
from latentguard.errors import LatentsError, UsageError
from latentguard.files import PassedOver
from latentguard.files.addresses import is_address, shown
from latentguard.files.remote import FileState, state_of_address, state_of_path
from latentguard.judge import PolicyId
from latentguard.scan.beat import Beat, Tell, hold_elsewhere
from latentguard.scan.entry import Entry, Written
from latentguard.scan.judges import Judges
from latentguard.scan.judging import Judging
from latentguard.scan.keep import check_keep
from latentguard.scan.lease import Lease, Task, hold
from latentguard.scan.options import RunOptions
from latentguard.scan.record import ScanRecord
from latentguard.scan.sampling import Cluster, ClusterSample, Drawn, SamplePlan
from latentguard.scan.schema import need_pyarrow
from latentguard.scan.shard import Facts, Shard, plan, scan_shard, unreadable
from latentguard.scan.store import Store, number_of, open_store
from latentguard.scan.tidy import Listing, listing, tidy
from latentguard.scan.unit import ENTRIES, Unit, entry_name
from latentguard.text import counted

RUN = "run.json"
SCHEMA_VERSION = 2
_ASKING = 16

Told = Callable[[Sequence[ScanRecord]], None]
"""Called with the records of each batch, to count or show them."""


def ignored(records: Sequence[ScanRecord]) -> None:
    """Does nothing."""


def untold(sentence: str) -> None:
    """Does nothing."""


@dataclass
class Run:
    """A run's folder, opened by one process.

    place: the folder or the address. shards: all of them. plan: of a sample. task: which of them
    are this process's.
    done: by number, the entries that hold.
    errors: how many images or files could not be read or judged so far.
    notes: sentences about what was found and mended.
    tell: told in one sentence what is waited for.
    """

    place: str
    policy: PolicyId
    store: Store
    options: RunOptions
    shards: list[Shard]
    plan: SamplePlan | None = None
    task: Task = (0, 1)
    done: dict[int, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: int = 0
    tell: Tell = field(default=untold, repr=False)
    _lease: Lease | Beat | None = field(default=None, repr=False)

    @property
    def wanted(self) -> list[Shard]:
        """The shards that are to be scanned. Of a sample there may be more once these are done."""
        if self.plan is None:
            return self.shards
        known = {shard.name: shard for shard in reversed(self.shards)}
        done = {name: self.done[s.number] for name, s in known.items() if s.number in self.done}
        count = self.plan.first({name: entry.outcomes.total() for name, entry in done.items()})
        return [known[name] for name in self.plan.shards[:count]]

    @property
    def sample(self) -> ClusterSample | None:
        """Of a sample, what was seen so far."""
        if self.plan is None:
            return None
        done = [self.done[shard.number] for shard in self.wanted if shard.number in self.done]
        seen = {entry.files[0]: Cluster(entry.images, entry.outcomes) for entry in done}
        return replace(self.plan.start(), clusters=seen)

    def pending(self) -> list[Shard]:
        """The shards of this process's task that are left. Of a sample there may be more once these
        are done."""
        mine, of = self.task
        return [s for s in self.wanted if s.number % of == mine and s.number not in self.done]

    @contextmanager
    def at_work(self, judging: Judging) -> Iterator[None]:
        """This process's shards are no other's while the block runs.

        Where it ends well, what writers left that were killed meanwhile is removed.
        Raises UsageError where another process works on them, or `judging` does not tell what the
        run's options ask for.
        """
        if judging.taxonomies != self.options.taxonomies:
            raise UsageError(
                f"the run in {self.place} reports verdicts in the taxonomies "
                f"{self.options.taxonomies}, but the judging in {judging.taxonomies}: make it "
                "with RunOptions.judging"
            )
        self._hold()
        try:
            yield
            if self._lease is not None:
                self._lease.check()
            tidy(self.store, self.done, listing(self.store), self.task)
        finally:
            self.close()

    def close(self) -> None:
        """Let other processes work on this one's shards."""
        if self._lease is not None:
            self._lease.release()
        self._lease = None

    def _hold(self) -> None:
        folder = self.store.folder
        if self._lease is not None:
            return
        if folder is None:
            self._lease = hold_elsewhere(self.store, self.place, self.task, self.tell)
            return
        try:
            self._lease = hold(folder, folder / RUN, self.task)
        except OSError as error:
            raise UsageError(f"the run in {self.place} cannot be written: {error}") from error

    def scan(self, shard: Shard, judging: Judging, told: Told = ignored) -> Entry:
        """Scan one shard in this process, and note that it is done."""
        entry = scan_unit(self.store, shard, self.options, judging, told)
        self.note(entry)
        return entry

    def note(self, entry: Entry) -> None:
        """Remember that a shard is done.

        Raises UsageError where another process may have taken over this one's shards.
        """
        if self._lease is not None:
            self._lease.check()
        self.errors += entry.errors
        self.done[entry.number] = entry


def scan_unit(
    store: Store,
    shard: Shard,
    options: RunOptions,
    judging: Judging,
    told: Told = ignored,
) -> Entry:
    """Scan a shard into a run: everything of it, or nothing.

    told: called with the records of each batch.
    Raises OSError where there is no room for what is written, UsageError where the run's place
    cannot be written.
    """
    facts = Facts()
    unit = Unit(store, shard, options, judging.judges)
    try:
        before = judging.seconds
        for records in scan_shard(shard, options, judging, facts):
            unit.add(records, judging.seconds - before)
            before = judging.seconds
            told(records)
        return unit.commit(facts)
    except LatentsError as error:
        return fail_unit(store, shard, options, judging, str(error))
    finally:
        unit.abandon()


def fail_unit(
    store: Store, shard: Shard, options: RunOptions, judging: Judging, error: str
) -> Entry:
    """Write a shard into a run as one that cannot be read."""
    unit = Unit(store, shard, options, judging.judges)
    try:
        unit.add(judging.judge(unreadable(shard, error)))
        return unit.commit(Facts())
    finally:
        unit.abandon()


# -- opening a run ---------------------------------------------------------------------------


def open_run(
    place: str,
    options: RunOptions,
    judges: Judges,
    paths: Sequence[str | Path] = (),
    passed: PassedOver | None = None,
    *,
    resume: bool = False,
    task: Task = (0, 1),
    tell: Tell = untold,
) -> Run:
    """Begin a run, or go on with one.

    The shards are this process's until `run_local` or `run_ray` ends, or `Run.close`.

    Args:
        paths: what to scan. Where a run goes on they may be left out, else they must hold the same
            files as when it began.
        passed: counts what folders hold that cannot be latents.
        resume: whether the run may be there already.
        task: (K, N): only the shards with number % N == K are this process's, as others may be at
            theirs.
        tell: told in one sentence what is waited for: on an object store, whether a process of
            another machine is still at work.

    Raises:
        UsageError: there is a run and `resume` is false; it was begun with another policy, model,
            option or other files; there is nothing to scan; another process works on these shards.
    """
    if options.sink == "parquet":
        need_pyarrow()
    if options.sample is not None and task[1] > 1:
        raise UsageError("the number of shards in a sample depends on all shards: leave out --task")
    store = open_store(place)
    said = store.read(RUN)
    if said is not None and not resume:
        raise UsageError(
            f"there is already a run in {place}: continue it with --resume, or name another folder"
        )
    passed = PassedOver() if passed is None else passed
    planned = list(plan(paths, passed, options.reading.strict)) if paths else None
    if said is None:
        if not planned:
            raise UsageError(f"there is no run in {place}, and no path was given to begin one")
        _check_apart(place, paths)
        if options.keep is not None:
            check_keep(planned)
        said = _begin(store, options, judges, planned)
    shards = _agreed(place, store, said, options, judges, planned)
    shards, sampled = _drawn(shards, options)
    run = Run(place, judges.rules.policy, store, options, shards, sampled, task, tell=tell)
    run._hold()
    try:
        _load(run, judges)
    except BaseException:
        run.close()
        raise
    return run


def _begin(store: Store, options: RunOptions, judges: Judges, shards: list[Shard]) -> bytes:
    """Write what the run is, unless another process has just done so; what is there now."""
    # Whoever may read what came of a run needs no signature or password of what was scanned.
    named = (replace(shard, files=tuple(map(shown, shard.files))) for shard in shards)
    lines = "".join(f"{shard.to_json()}\n" for shard in named).encode("ascii")
    digest = hashlib.sha256(lines).hexdigest()
    store.write(_list_name(digest), lines)
    about = {
        "schema_version": SCHEMA_VERSION,
        "latentguard": latentguard.__version__,
        "options": options.identity(judges),
        "shards": len(shards),
        "shards_sha256": digest,
    }
    store.create(RUN, json.dumps(about, indent=1).encode("ascii") + b"\n")
    said = store.read(RUN)
    if said is None:
        raise UsageError(f"{RUN} disappears as soon as it is written: this place cannot be used")
    return said


def _drawn(shards: list[Shard], options: RunOptions) -> tuple[list[Shard], SamplePlan | None]:
    """Shards as a sample takes them, and the order in which it does."""
    draw = options.sample
    if draw is None:
        return shards, None
    names = (shard.name for shard in shards)
    sampled = SamplePlan.of(names, draw.images, draw.seed, draw.spread)
    how = Drawn(len(sampled.shards), sampled.rows, sampled.seed)
    return [replace(shard, drawn=how) for shard in shards], sampled


def _list_name(digest: str) -> str:
    return f"shards-{digest[:16]}.jsonl"


def _agreed(
    place: str,
    store: Store,
    said: bytes,
    options: RunOptions,
    judges: Judges,
    planned: list[Shard] | None,
) -> list[Shard]:
    """The shards of a run that is what this process is asked for. Raises UsageError."""
    try:
        about = json.loads(said)
        version, begun = about["schema_version"], about["options"]
        digest = about["shards_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{place}: {RUN} is damaged ({error}): begin another run") from error
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{place} is a run of another version of latentguard (its schema_version is {version}, "
            f"not {SCHEMA_VERSION}): continue it with that version, or begin another run"
        )
    now = json.loads(json.dumps(options.identity(judges)))
    for key in now:
        was, value = begun.get(key), now[key]
        if was != value:
            if key == "reading" and isinstance(was, dict) and was.keys() == value.keys():
                key = next(name for name in value if was[name] != value[name])
                was, value = was[key], value[key]
            before, after = _in_words(was), _in_words(value)
            if before == after:
                before, after = _brief(was), _brief(value)
            raise UsageError(
                f"the run in {place} was begun with {key} {before}, but now it is {after}: give "
                "the options that it was begun with, or begin another run"
            )
    lines = store.read(_list_name(digest))
    if lines is None or hashlib.sha256(lines).hexdigest() != digest:
        raise UsageError(f"{place}: {_list_name(digest)} is damaged or gone: begin another run")
    shards = [Shard.from_json(line) for line in lines.splitlines()]
    if planned is None:
        return shards
    _check_same_files(place, shards, planned)
    files = iter([name for shard in planned for name in shard.files])
    # What could not be listed then may be there now.
    mended = {name for shard in planned if shard.error is None for name in map(shown, shard.files)}
    return [
        replace(
            shard,
            files=tuple(next(files) for _ in shard.files),
            error=None if mended.issuperset(map(shown, shard.files)) else shard.error,
        )
        for shard in shards
    ]


def _in_words(value: Any) -> str:
    """A value of an option in a sentence: `family 1.0 (sha256 100f98a0ecc6)`."""
    if isinstance(value, list) and value:
        return ", ".join(map(_in_words, value))
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        sha256 = value.get("sha256")
        words = [value["name"], value.get("version"), sha256 and f"(sha256 {sha256[:12]})"]
        return " ".join(word for word in words if word)
    if value is None:
        return "not set"
    return _brief(value)


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _check_same_files(place: str, shards: list[Shard], planned: list[Shard]) -> None:
    begun = [shown(name) for shard in shards for name in shard.files]
    now = [shown(name) for shard in planned for name in shard.files]
    if begun == now:
        return
    for these, those, what in ((now, begun, "has not"), (begun, now, "has")):
        known = set(those)
        other = next((name for name in these if name not in known), None)
        if other is not None:
            raise UsageError(
                f"the run in {place} {what} {other} and is of {len(begun):,} files, the "
                f"paths given hold {len(now):,}: begin another run for what is new"
            )
    raise UsageError(f"the run in {place} has its files in another order: give the same paths")


def _check_apart(place: str, paths: Sequence[str | Path]) -> None:
    """Raises UsageError for a run in a folder that is scanned: it would be scanned itself."""
    if is_address(place):
        inside = [p for p in map(str, paths) if place.startswith(p.rstrip("/") + "/")]
    else:
        target = Path(place).resolve()
        inside = [
            str(p)
            for p in paths
            if not is_address(p) and Path(p).resolve() in (target, *target.parents)
        ]
    if inside:
        raise UsageError(f"--run {place} is inside {inside[0]}, which is scanned: put it elsewhere")


# -- what is done ----------------------------------------------------------------------------


def _load(run: Run, judges: Judges) -> None:
    """Find what is done, check it, and remove what is left of what is not."""
    there, task = listing(run.store), run.task
    numbers = [n for n in map(number_of, there[ENTRIES]) if n is not None]
    with ThreadPoolExecutor(_ASKING) as pool:
        found = zip(numbers, pool.map(lambda n: _entry(run, n), numbers), strict=True)
        whole = {n: entry for n, entry in found if entry is not None and _is_whole(entry, there)}
        mine = [n for n in whole if n % task[1] == task[0]]
        reasons = list(pool.map(lambda n: _reason_to_redo(run.shards[n], whole[n]), mine))
    redone = dict(zip(mine, reasons, strict=True))
    damaged = sum(n % task[1] == task[0] and n not in whole for n in numbers)
    for number, reason in redone.items():
        if reason is not None:
            del whole[number]
            run.notes.append(f"{shown(run.shards[number].files[0])}: {reason}; it is scanned again")
    if damaged:
        run.notes.append(f"incomplete and scanned again: {counted(damaged, 'shard')}")
    _check_models(run, judges, whole.values())
    for entry in whole.values():
        run.note(entry)
    left = tidy(run.store, run.done, there, task)
    if left:
        run.notes.append(f"removed {counted(left, 'file')} that an interrupted process had left")


def _entry(run: Run, number: int) -> Entry | None:
    """What the manifest says of a shard; None for what is damaged, or of another shard."""
    data = run.store.read(entry_name(number))
    if data is None or number >= len(run.shards):
        return None
    try:
        entry = Entry.from_json(data)
    except ValueError:
        return None
    files = tuple(shown(name) for name in run.shards[number].files)
    return entry if (entry.number, entry.files) == (number, files) else None


def _is_whole(entry: Entry, there: Listing) -> bool:
    """Whether all files of a shard that is done are there, of the right size."""

    def stands(file: Written) -> bool:
        folder, _, name = file.name.partition("/")
        return there.get(folder, {}).get(name) == file.size

    return all(map(stands, entry.written))


def _reason_to_redo(shard: Shard, entry: Entry) -> str | None:
    """Why a shard that is done must be scanned again; None where what was read is still there."""
    if shard.error is not None:
        return None
    for name in shard.files:
        was = entry.states.get(shown(name))
        if was is None:
            return "could not be opened before"
        now = _state(name)
        if now is None:
            return "can no longer be opened"
        if now != was:
            return f"changed since it was scanned ({was.size:,} bytes then, {now.size:,} now)"
    return None


def _state(name: str) -> FileState | None:
    try:
        return state_of_address(name) if is_address(name) else state_of_path(Path(name))
    except (LatentsError, OSError):
        return None


def _check_models(run: Run, judges: Judges, entries: Iterable[Entry]) -> None:
    """Raises UsageError where a space would now be judged by another model than before."""
    known: dict[str, tuple[str, str]] = {}
    for entry in entries:
        for space, model in entry.models.items():
            known.setdefault(space, model)
    for space, model in known.items():
        judge = judges.of(space)
        if isinstance(judge, str) or tuple(judge.info.id) != tuple(model):
            now = (
                judge
                if isinstance(judge, str)
                else f"{judge.info.id.name} ({judge.info.id.sha256[:12]})"
            )
            raise UsageError(
                f"the run in {run.place} had {space} latents judged by {model[0]} "
                f"({model[1][:12]}), and now: {now}. Name that model, or begin another run"
            )
