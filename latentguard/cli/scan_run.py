"""`latentguard scan --run DIR`: many shards into a folder, each exactly once."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from latentguard.cli.exit_codes import EXIT_INTERRUPTED, EXIT_UNREADABLE, FailOn, of_scan
from latentguard.errors import TooManyErrorsError, UsageError

if TYPE_CHECKING:
    from latentguard.cli.scan_progress import Told
    from latentguard.files import PassedOver
    from latentguard.scan import ScanRecord, Summary
    from latentguard.scan.entry import Entry
    from latentguard.scan.judges import Judges
    from latentguard.scan.judging import Judging
    from latentguard.scan.options import RunOptions
    from latentguard.scan.run import Run

_SIZE = re.compile(r"(\d{1,12})\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_ACTORS = re.compile(r"(\d{1,6})(?::(\d{1,6}))?")
_TASK = re.compile(r"(\d{1,9})/(\d{1,9})")


def scan_run(
    place: str,
    paths: Sequence[str],
    reading: Mapping[str, Any],
    judging: Mapping[str, Any],
    options: Mapping[str, Any],
    fail_on: FailOn,
    quiet: bool,
    showing: Mapping[str, Any],
) -> NoReturn:
    """Begin or continue a run, and exit as `latentguard scan` does.

    reading: arguments of `Reading.of`. judging: arguments of `RunOptions`, with the policy's name.
    options: those of a run, None if not given. showing: arguments of `scan_progress.shown`.
    """
    from latentguard.files import PassedOver, Reading
    from latentguard.files.lists import listed
    from latentguard.policy import load_policy
    from latentguard.scan.options import RunOptions
    from latentguard.scan.run import open_run

    task = _task(options["task"])
    engine = _engine(options)
    name, by_file = judging["policy"], judging["model"].endswith(".onnx")
    run_options = RunOptions(
        **{
            **judging,
            "policy": None if by_file and name is None else load_policy(name or "default"),
            "reading": Reading.of(**reading),
            "sink": options["sink"] or "parquet",
            "keep": options["keep"],
        }
    )
    judges = engine.judges(run_options)
    passed = PassedOver()
    run = open_run(
        place,
        run_options,
        judges,
        list(listed(paths, sys.stdin)),
        passed,
        resume=bool(options["resume"]),
        task=task,
        tell=lambda sentence: None if quiet else typer.echo(f"latentguard: {sentence}", err=True),
    )
    stopped: TooManyErrorsError | None = None
    try:
        scoring = run_options.judging(judges, "late" if options["previews"] else False)
        _work(run, scoring, engine, options["max_errors"], quiet, showing)
    except KeyboardInterrupt:
        typer.echo(f"latentguard: interrupted; {_progress(run)}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except TooManyErrorsError as error:
        stopped = error
    except OSError as error:
        raise UsageError(
            f"cannot write {error.filename or place}: {error.strerror or error}; {_progress(run)}"
        ) from error
    summary = _summary(run, passed)
    if not quiet:
        _conclude(run, summary)
    if stopped is not None:
        typer.echo(f"latentguard: {stopped}", err=True)
        raise typer.Exit(EXIT_UNREADABLE)
    raise typer.Exit(of_scan(summary, fail_on))


def _work(
    run: Run,
    judging: Judging,
    engine: _Engine,
    max_errors: int | None,
    quiet: bool,
    showing: Mapping[str, Any],
) -> None:
    from latentguard.cli.scan_progress import Told, shown

    mine = sum(shard.number % run.task[1] == run.task[0] for shard in run.wanted)
    left = len(run.pending())
    readers = engine.readers
    workers = None
    if readers is not None:
        workers = {"read": readers, "decode": readers, "score": judging.judges.lanes}
    with shown(shards=mine, done=mine - left, workers=workers, **showing) as progress:
        shower = _Shown(run, judging, Told(progress, judging.judges.notes, quiet))
        engine.work(run, judging, shower, max_errors=max_errors)


@dataclass(frozen=True)
class _Engine:
    """An engine that scans a run.

    judges: makes the judges from the options of a run, or what is known about them. work: called
    with the run, the judging, what shows progress, and max_errors. readers: the number of processes
    that read, if it is known.
    """

    judges: Callable[[RunOptions], Judges]
    work: Callable[..., None]
    readers: int | None


_LOCAL = ("workers", "max_memory")
_RAY = ("actors", "cpus_per_actor", "gpus_per_actor")


def _engine(options: Mapping[str, Any]) -> _Engine:
    """The engine that `--engine` names. Raises UsageError for options of the other one."""
    name = options["engine"] or "local"
    for other in _RAY if name == "local" else _LOCAL:
        if options[other] is not None:
            raise UsageError(f"--{other.replace('_', '-')} does not work with --engine {name}")
    return _ray(options) if name == "ray" else _local(options)


def _local(options: Mapping[str, Any]) -> _Engine:
    from latentguard.scan.judges import default_lanes
    from latentguard.scan.local import MAX_MEMORY, run_local
    from latentguard.scan.options import RunOptions
    from latentguard.scan.reader import default_workers

    said, max_memory = options["workers"], _bytes(options["max_memory"])
    readers = default_workers() if said is None else said

    def work(run: Run, judging: Judging, shown: _Shown, **how: Any) -> None:
        run_local(
            run,
            judging,
            workers=readers,
            max_memory=MAX_MEMORY if max_memory is None else max_memory,
            told=shown,
            **how,
        )
        shown([])  # the last shard

    lanes = default_lanes() if readers else 1
    return _Engine(partial(RunOptions.judges, lanes=lanes), work, max(readers, 1))


def _ray(options: Mapping[str, Any]) -> _Engine:
    from latentguard.scan.ray_engine import Pool, need_ray, run_ray
    from latentguard.scan.told import ToldJudges

    need_ray()
    cpus = options["cpus_per_actor"]
    pool = Pool(
        _actors(options["actors"]), 1.0 if cpus is None else cpus, options["gpus_per_actor"]
    )

    def work(run: Run, judging: Judging, shown: _Shown, **how: Any) -> None:
        run_ray(run, judging, pool, noted=shown.note, **how)

    return _Engine(ToldJudges, work, None)


class _Shown:
    """Shows records as they are judged, and how many shards are done."""

    def __init__(self, run: Run, judging: Judging, told: Told) -> None:
        self._run, self._judging, self._told = run, judging, told
        self._done = len(run.done)
        self._seconds = {"read": 0.0, "decode": 0.0, "score": 0.0}
        for note in run.notes:
            told.say(note)

    def __call__(self, records: Sequence[ScanRecord]) -> None:
        more = len(self._run.done) - self._done
        for entry in islice(reversed(self._run.done.values()), more):
            self._spend(entry, ("read", "decode"))
        self._done += more
        self._seconds["score"] = self._judging.seconds
        self._told(records, self._seconds, more)

    def note(self, entry: Entry) -> None:
        """Count a whole shard, for an engine whose records do not come here."""
        from latentguard.scan.progress import Counts

        self._done += 1
        self._spend(entry, self._seconds)
        self._told.add(Counts(entry.outcomes, entry.decisions), self._seconds, 1)

    def _spend(self, entry: Entry, phases: Iterable[str]) -> None:
        for phase in phases:
            self._seconds[phase] += entry.microseconds[phase] / 1e6


def _summary(run: Run, passed: PassedOver) -> Summary:
    """The summary of all finished shards of the run, whichever task scanned them."""
    from latentguard.files import PassedOver
    from latentguard.judge import ModelId
    from latentguard.scan import Summary

    entries = run.done.values()
    total = Summary(run.policy, passed=PassedOver())
    total.passed.add(passed)
    models: Counter[ModelId] = Counter()
    for entry in entries:
        total.outcomes += entry.outcomes
        total.decisions += entry.decisions
        total.passed.add(entry.passed)
        models.update(ModelId(*model) for model in entry.models.values())
    total.models = models
    return total


def _conclude(run: Run, summary: Summary) -> None:
    from latentguard.scan.estimates import sentences
    from latentguard.scan.text import visible

    drawn = sentences(run.sample) if run.sample is not None else []
    for line in filter(None, (summary.passed.line(), summary.line(), *drawn, _progress(run))):
        typer.echo(visible(line, 2000))


def _progress(run: Run) -> str:
    """A sentence that says how far a run is."""
    done, of = len(run.done), len(run.wanted)
    rest = "" if done == of else "; --resume continues it"
    return f"run {run.place}: {done:,} of {of:,} shards are done{rest}"


def _bytes(text: str | None) -> int | None:
    """`512MiB`, `2G`, `1000000`: powers of 1,024."""
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if found is None or int(found[1]) == 0:
        raise UsageError(f"--max-memory must be a size such as 512MiB, got {text!r:.60}")
    return int(found[1]) << (10 * " kmgt".index(found[2].lower() or " "))


def _actors(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = _ACTORS.fullmatch(text)
    if found is None:
        raise UsageError(f"--actors must be a number or MIN:MAX, got {text!r:.60}")
    return int(found[1]), int(found[2] or found[1])


def _task(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    found = _TASK.fullmatch(text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"--task must be K/N with K from 0 to N - 1, got {text!r:.60}")
    return int(found[1]), int(found[2])
