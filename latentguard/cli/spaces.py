"""`latentguard spaces`: which latent spaces are known, and how a file of your own looks."""

from __future__ import annotations

import json
import sys
from typing import Literal

import typer

spaces_app = typer.Typer(no_args_is_help=True, help="List and describe latent spaces.")


Format = Literal["table", "json", "markdown"]
"""How `list` prints."""


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(spaces_app, name="spaces")


@spaces_app.command("list")
def list_(
    output: Format = typer.Option("table", "--format", help="Print a table, JSON or Markdown."),
) -> None:
    """List the known latent spaces: the shipped ones, then those of installed packages."""
    from latentguard.spaces import table

    if output == "markdown":
        typer.echo(table.markdown())
        return
    rows = table.rows()
    if output == "json":
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table("space", "channels", "pixels", "tokens", "RGB view", "models")
    for row in rows:
        shown.add_row(
            f"[bold]{row['space']}[/bold]",
            str(row["channels"]),
            str(row["pixels"]),
            row["tokens"],
            row["RGB view"],
            row["models"],
        )
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


@spaces_app.command()
def show(
    space: str = typer.Argument(help="A name from `latentguard spaces list`, or a file."),
) -> None:
    """Print a latent space as JSON, in the format of a file of your own. It checks such files."""
    from latentguard.spaces import LatentSpace
    from latentguard.spaces.records import SUFFIXES

    own = space.endswith(SUFFIXES)
    found = LatentSpace.from_file(space) if own else LatentSpace.get(space)
    typer.echo(json.dumps(found.to_dict(), indent=2))
