"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY = 60.0


class Progress:
    """Counts to `total`, if that is known, on stderr; `note` is shown beside the bar."""

    def __init__(self, title: str, total: int | None, done: int = 0) -> None:
        self._title, self._total, self._done = title, total, done
        self._next = time.monotonic() + LINE_EVERY
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=note)
        elif time.monotonic() >= self._next or self._done == self._total:
            self._next = time.monotonic() + LINE_EVERY
            of = "" if self._total is None else f"/{self._total}"
            print(f"{self._title}: {self._done}{of} {note}", file=sys.stderr, flush=True)
