"""Every `latentguard` command of README and docs exists with its options, and so does every name
that their Python imports. Other tests run the main ones."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from latentguard.cli import app, register

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "integrations").glob("*/README.md")),
    ROOT / "examples" / "README.md",
]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def blocks(*kinds: str) -> Iterator[tuple[str, str]]:
    """Where each block of some languages is, and its text."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in FENCE.finditer(text):
            if found[2] in kinds:
                line = text.count("\n", 0, found.start()) + 1
                yield f"{page.relative_to(ROOT)}:{line}", textwrap.dedent(found[3])


def commands() -> Iterator[tuple[str, str]]:
    """Every line that calls `latentguard`, with the lines that continue it."""
    for where, text in blocks("", "bash", "sh", "shell", "console"):
        joined = re.sub(r"\\\n\s*", " ", text)
        for line in joined.splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("latentguard "):
                yield where, line


COMMANDS = sorted(set(commands()))


def test_there_are_many() -> None:
    assert len(COMMANDS) > 80


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_a_command_has_its_options(where: str, line: str) -> None:
    register()
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|><&;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = list(lexer)[1:]
    command: Any = typer.main.get_command(app)
    path = ["latentguard"]
    while getattr(command, "commands", None) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name == "|":  # a list of commands, as in `policy list | show`
            return
        assert name in command.commands, f"{where}: {' '.join(path)} has no command {name!r}"
        command = command.commands[name]
        path.append(name)
    if path[-1] == "zeroshot" and "--generate" in words:  # which goes on there
        words.remove("--generate")
        command = typer.main.get_command(app).commands["evaluate"].commands["generated"]  # type: ignore[attr-defined]
    known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    known |= {"--help"}
    for word in words:
        if word and word[0] in "|><&;":
            break
        if re.match(r"--?[A-Za-z]", word):
            option = word.partition("=")[0]
            assert option in known, f"{where}: {' '.join(path)} has no option {option}"


PYTHON = sorted(set(blocks("python", "py")))


@pytest.mark.parametrize(("where", "text"), PYTHON, ids=[where for where, _ in PYTHON])
def test_a_python_block_imports_what_there_is(where: str, text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latentguard"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{where}: {node.module} has no {alias.name}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("latentguard"):
                    importlib.import_module(alias.name)
