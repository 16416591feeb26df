"""Markdown tables of what was measured, beside published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A row of somebody else's table. source: where it stands. figures: by column."""

    name: str
    source: str
    figures: Mapping[str, float]


def cell(value: Mapping[str, Any] | None) -> str:
    """A figure with its interval; an empty cell where nothing was measured."""
    if value is None:
        return ""
    low, high = value["interval"]
    return f"{value['value']:.3f} [{low:.3f}, {high:.3f}]"


def markdown(
    columns: Sequence[str],
    measured: Sequence[tuple[str, Mapping[str, str]]],
    published: Sequence[Published],
) -> str:
    """One row for each arm and for each published model; empty cells are what nobody measured."""
    lines = ["| | " + " | ".join(columns) + " | source |", "| --- " * (len(columns) + 2) + "|"]
    for name, cells in measured:
        row = [cells.get(column, "") for column in columns]
        lines.append(f"| **{name}** | " + " | ".join(row) + " | this run |")
    for item in published:
        row = [f"{item.figures[c]:g}" if c in item.figures else "" for c in columns]
        lines.append(f"| {item.name} | " + " | ".join(row) + f" | {item.source} |")
    return "\n".join(lines) + "\n"
