"""The documentation site: files of the repository that pages link to, and the commands' help.

MkDocs reads docs/ alone. README.md becomes the home page. What pages refer to outside of docs/ is
added under the name that it has in the repository. Links are written as they work in the
repository, and are turned here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ALSO = ("benchmarks/results/*.md", "benchmarks/results/*.png", "examples/README.md")
TOP = ("CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of docs/."""
    added = {"index.md": ROOT / "README.md", **{name: ROOT / name for name in TOP}}
    added |= {str(path.relative_to(ROOT)): path for also in ALSO for path in ROOT.glob(also)}
    for name, path in added.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "cli.md", content=_commands()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the repository into those of the site."""
    name = page.file.src_uri
    if name == "index.md" or name in TOP:
        # A folder is no page.
        markdown = re.sub(r"\[([^\]]+)\]\(benchmarks/results\)", r"\1", markdown)
        return markdown.replace("](docs/", "](")
    if "/" in name:
        return markdown.replace("](../docs/", "](../")
    return markdown.replace("](../", "](")


def _commands() -> str:
    """Every command with its options, as `--help` says them."""
    import typer.main

    from latentguard.cli import app, register

    register()
    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", "As `latentguard COMMAND --help` says it.", ""]
    _describe(group, "latentguard", lines)
    return "\n".join(lines)


def _describe(command: Any, name: str, lines: list[str]) -> None:
    import click

    context = click.Context(command, info_name=name)
    children = getattr(command, "commands", {})
    if not children:
        lines += [f"## {name}", "", _plain(command.help or ""), "", "| option | |", "| --- | --- |"]
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            names = ", ".join([*parameter.opts, *parameter.secondary_opts])
            said = (
                _plain(getattr(parameter, "help", "") or "").replace("\n", " ").replace("|", "\\|")
            )
            lines.append(f"| `{names}` | {said} |")
        lines.append("")
    for child in children:
        _describe(command.get_command(context, child), f"{name} {child}", lines)


def _plain(text: str) -> str:
    """Help without the marks of a terminal."""
    text = re.sub(r"\[/?[a-z ]*\]", "", text)
    return text.replace("\b", "").replace("<", "&lt;").strip()
