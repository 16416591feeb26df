"""`latentguard models`: which encoders there are, where they are stored, how to get one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import typer

models_app = typer.Typer(no_args_is_help=True, help="List, fetch and describe encoders.")


Format = Literal["table", "json"]
"""How models are printed."""


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(models_app, name="models")


@models_app.command("list")
def list_(
    output: Format = typer.Option("table", "--format", help="Print a table, or one JSON array."),
) -> None:
    """List the encoders that have a name, and which of them are on this machine."""
    from latentguard.encoders.catalog import entries

    rows = [_describe(entry.name) for entry in entries()]
    if output == "json":
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "space", "on this machine", "size", "sha256", "what it is")
    for row in rows:
        table.add_row(
            f"[bold]{row['name']}[/bold]",
            row["space"] or "any RGB view",
            row["state"],
            _size(row["size"]),
            (row["sha256"] or "")[:12],
            row["summary"],
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if any(row["path"] is None for row in rows):
        console.print("Fetch one with: latentguard models get NAME", highlight=False)


@models_app.command()
def get(
    name: str = typer.Argument(help="A name from `latentguard models list`."),
    source: Path | None = typer.Option(
        None, "--from", help="Install this official checkpoint file instead of downloading it."
    ),
    force: bool = typer.Option(
        False, "--force", help="Download and convert the encoder even if it is already here."
    ),
    keep: bool = typer.Option(
        False, "--keep-download", help="Keep the original file after it was converted."
    ),
) -> None:
    """Download an encoder from its official repository, convert it, and keep it in the cache."""
    from rich.console import Console

    from latentguard.encoders import hub
    from latentguard.encoders.catalog import converted_path

    entry = hub.find(name)
    console = Console(stderr=True, highlight=False)
    if entry.bundled:
        console.print(f"{name} is bundled with latentguard: nothing to fetch", soft_wrap=True)
    elif source is None and not force and converted_path(name).is_file():
        console.print(
            f"{name} is already here: {converted_path(name)} (--force downloads it again)",
            soft_wrap=True,
        )
    elif source is not None:
        with console.status(f"converting {source}"):
            path = hub.install(name, source)
        console.print(f"{name} installed at {path}", soft_wrap=True)
    else:
        console.print(f"fetching {entry.url} ({_size(entry.size)})", soft_wrap=True)
        path = hub.fetch(name, keep=keep)
        console.print(f"{name} installed at {path}", soft_wrap=True)


@models_app.command()
def show(
    name: str = typer.Argument(help="A name from `latentguard models list`, or a model file."),
    output: Format = typer.Option("table", "--format", help="Print lines, or one JSON object."),
) -> None:
    """Show where an encoder is stored, its size, digest and configuration, and how to get it."""
    from latentguard.text import visible

    row = _describe(name)
    if output == "json":
        typer.echo(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        if value is not None:
            shown = _size(value) if key == "size" else value
            text = json.dumps(shown) if isinstance(shown, dict) else str(shown)
            typer.echo(f"{key:<14} {visible(text, 4000)}")


def _describe(name: str) -> dict[str, Any]:
    """All that is known of a model without loading it."""
    from latentguard.encoders import hub
    from latentguard.encoders.catalog import converted_path, how_to_get, known, locate

    if known(name) is None and Path(name).expanduser().is_file():
        return _describe_file(Path(name).expanduser())
    entry = hub.find(name)
    path = locate(name)
    ready = path is not None and (entry.bundled or path == converted_path(name))
    state = "no"
    if path is not None:
        state = "bundled" if entry.bundled else "yes" if ready else "yes, not converted yet"
    row: dict[str, Any] = {
        "name": name,
        "space": entry.space,
        "summary": entry.summary,
        "state": state,
        "path": None if path is None else str(path),
        "size": entry.size if path is None else path.stat().st_size,
        "source": None if entry.bundled else entry.url,
        "how to get it": how_to_get(name) if path is None and not entry.bundled else None,
        "sha256": None,
    }
    if path is not None and ready:
        # One file may go by several names, and read several spaces.
        row |= _from_header(path) | {"name": name, "space": entry.space}
    return row


def _describe_file(path: Path) -> dict[str, Any]:
    row = {"name": path.stem, "path": str(path), "size": path.stat().st_size}
    if path.suffix == ".safetensors":
        return row | _from_header(path)
    return row | {"state": "a checkpoint, to be converted when it is first loaded"}


def _from_header(path: Path) -> dict[str, Any]:
    """What a file of latentguard says about itself; the digest as the encoder will state it."""
    from latentguard.encoders.header import opened, read_metadata
    from latentguard.regular import sha256_of

    metadata = read_metadata(path)
    digest = metadata.get("sha256")
    if digest is None:
        with opened(path) as file:
            digest = sha256_of(file)
    facts: dict[str, Any] = {"sha256": digest}
    for key in ("format", "name", "source_sha256", "space", "card"):
        if key in metadata:
            facts[key] = metadata[key]
    if "config" in metadata:
        facts["config"] = json.loads(metadata["config"])
    return facts


def _size(size: int) -> str:
    """Bytes for people, in powers of 1000 as disks and download pages count."""
    if size == 0:
        return "-"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
