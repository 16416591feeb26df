"""Small text files of an evaluation: names, labels, templates."""

from __future__ import annotations

from pathlib import Path

from latentguard.errors import ModelError
from latentguard.regular import problem, read_bounded

MAX_LINES = 1 << 20
MAX_BYTES = 64 * 2**20


def read_text(path: Path) -> str:
    """A file's text. Raises ModelError: not regular, over `MAX_BYTES`, or not UTF-8."""
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: cannot be read as text: {error}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read as text: {problem(error)}") from error


def read_lines(path: Path) -> list[str]:
    """A file's lines, of which there must be 1 to `MAX_LINES`. Raises ModelError."""
    lines = read_text(path).splitlines()
    if not 0 < len(lines) <= MAX_LINES:
        raise ModelError(f"{path}: must have 1 to {MAX_LINES} lines, got {len(lines)}")
    return lines
