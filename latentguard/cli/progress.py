"""Which views of progress a scan has, by its options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from latentguard.scan.progress import Progress, View

ProgressKind = Literal["auto", "bar", "json", "none"]
"""How progress shows: `auto` is a bar where it disturbs nothing."""


@contextmanager
def showing(
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

    disturbs: whether a bar would stand among rows of output. The rest is of `Progress`,
    `JsonProgress` and `Metrics`.
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


def say(progress: Progress) -> Callable[[str], None]:
    """Shows sentences without tearing a bar apart."""

    def on_stderr(note: str) -> None:
        from latentguard.text import visible

        if not progress.say(note):
            typer.echo(f"latentguard: {visible(note, 1000)}", err=True)

    return on_stderr
