"""The progress views that the options of a scan ask for, and notes that do not break a bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from latentguard.scan import ScanRecord
    from latentguard.scan.progress import Counted, Progress, View

ProgressKind = Literal["auto", "bar", "json", "none"]
"""How progress is shown: `auto` is a bar if it disturbs nothing."""


@contextmanager
def shown(
    kind: ProgressKind,
    *,
    disturbs: bool = False,
    every: float = 10.0,
    metrics_port: int | None = None,
    metrics_host: str = "127.0.0.1",
    shards: int | None = None,
    done: int = 0,
    workers: Mapping[str, int] | None = None,
) -> Iterator[Progress]:
    """Progress on standard error, and as metrics; the views close when the block ends.

    disturbs: whether a bar would appear among rows of output. The others are arguments of
    `Progress`, `JsonProgress` and `Metrics`.
    """
    from latentguard.scan.progress import Progress
    from latentguard.scan.progress_views import Bar, JsonProgress, Metrics

    views: list[View] = []
    if metrics_port is not None:
        views.append(Metrics(metrics_port, metrics_host))
    if kind == "json":
        views.append(JsonProgress(sys.stderr, every))
    if kind == "bar" or (kind == "auto" and sys.stderr.isatty() and not disturbs):
        views.append(Bar(sys.stderr))
    progress = Progress(views, shards=shards, done=done, workers=workers)
    finished = False
    try:
        yield progress
        finished = True
    finally:
        progress.close(finished)


class Told:
    """Passes new records and new notes on to the progress views."""

    def __init__(self, progress: Progress, notes: Sequence[str], quiet: bool) -> None:
        self._progress, self._notes, self._quiet = progress, notes, quiet
        self._told = 0
        self._seconds: dict[str, float] = {}

    def __call__(
        self, records: Sequence[ScanRecord], seconds: Mapping[str, float], shards: int = 0
    ) -> None:
        """seconds: of each phase, in total so far. shards: how many more are done."""
        from latentguard.scan.progress import Counts

        counts = Counts()
        for record in records:
            counts.outcomes[record.outcome] += 1
            counts.decisions[record.verdict.decision] += 1
        self.add(counts, seconds, shards)

    def add(self, counts: Counted, seconds: Mapping[str, float], shards: int = 0) -> None:
        """The same as a call, with the counts instead of the records."""
        new = {phase: value - self._seconds.get(phase, 0.0) for phase, value in seconds.items()}
        self._seconds = dict(seconds)
        self._progress.update(counts, new, shards=shards)
        for note in self._notes[self._told :]:
            self.say(note)
        self._told = len(self._notes)

    def say(self, note: str) -> None:
        """Show a sentence, unless the scan is quiet."""
        from latentguard.text import visible

        if not self._quiet and not self._progress.say(note):
            typer.echo(f"latentguard: {visible(note, 1000)}", err=True)
