"""The progress bar of a scan, and notes that do not tear it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from latentguard.scan import Summary


class Step:
    """Called once per image with the counts and the notes that are new."""

    def __call__(self, summary: Summary, notes: list[str] | tuple[str, ...]) -> None:
        for note in notes:
            self.say(note)

    def say(self, note: str) -> None:
        from latentguard.scan.text import visible

        typer.echo(f"latentguard: {visible(note, 1000)}", err=True)


@contextmanager
def progress(shown: bool) -> Iterator[Step]:
    """A bar on standard error; how many images there are is known at the end only."""
    if not shown:
        yield Step()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:,} images"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[rate]:.1f}/s"),
        TextColumn("[red]{task.fields[blocked]:,} blocked[/red]"),
        TextColumn("[yellow]{task.fields[review]:,} review[/yellow]"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("scan", total=None, rate=0.0, blocked=0, review=0)

        class OnBar(Step):
            def __call__(self, summary: Summary, notes: list[str] | tuple[str, ...]) -> None:
                super().__call__(summary, notes)
                bar.update(
                    task,
                    completed=summary.images,
                    rate=summary.images / max(summary.seconds, 1e-9),
                    blocked=summary.decisions["block"],
                    review=summary.decisions["review"],
                )

            def say(self, note: str) -> None:
                from latentguard.scan.text import visible

                bar.console.print(Text(f"latentguard: {visible(note, 1000)}"))

        yield OnBar()
