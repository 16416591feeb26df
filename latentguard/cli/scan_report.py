"""`latentguard scan report`: what runs left, as one page."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from latentguard.errors import UsageError

_PAGES, _TALLIES = (".html", ".htm"), (".json",)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("scan report", no_args_is_help=True)(report)


def report(
    parts: list[str] = typer.Argument(
        metavar="PART",
        help="Folders and addresses of runs, files of records (.jsonl, .parquet), and tallies "
        "(.json). They may come from any number of shards and runs, but from one policy.",
        show_default=False,
    ),
    output: Path = typer.Option(
        ...,
        "--output",
        "-o",
        metavar="FILE",
        help="FILE.html: a self-contained page. FILE.json: the sum of the parts, which can be a "
        "part of another report.",
        show_default=False,
    ),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No summary; errors still show."),
) -> None:
    """Combine scans in one report: throughput, decisions, and what other thresholds would do.

    To scan a path that is called `report`, write `latentguard scan ./report`.

    Exit codes: 0 the report was written; 2 wrong usage, or parts that cannot be read or do not fit
    together.
    """
    _check_target(output, parts)
    from latentguard.scan import run_report
    from latentguard.scan.parts import collect
    from latentguard.scan.tally_file import write_tally

    collected = collect(parts)
    if output.suffix.lower() in _TALLIES:
        write_tally(output, collected.tally)
    else:
        run_report.write(output, collected)
    if not quiet:
        for line in (run_report.summary(collected), *collected.tally.taxonomies.lines()):
            typer.echo(line)


def _check_target(output: Path, parts: list[str]) -> None:
    """Never write over a part, nor find after an hour that nothing can be written."""
    if output.suffix.lower() not in _PAGES + _TALLIES:
        raise UsageError(f"--output must end in .html or .json, got {output}")
    if output.is_dir():
        raise UsageError(f"--output must be a file, {output} is a folder")
    if not output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {output.parent}")
    if output.exists() and any(
        os.path.exists(part) and os.path.samefile(part, output) for part in parts
    ):
        raise UsageError(f"--output would write over a part: {output}")
