"""What `latentguard concept` prints for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentguard.text import visible

if TYPE_CHECKING:
    from latentguard.learn import Figures, Lesson, Tested
    from latentguard.policy.examples import ConceptFile

SHOWN = 10
"""Names that a list has before it says how many more there are."""
_CAPTION = "[low, high]: 95 % interval; different examples count once"


def lesson_table(name: str, out: Path, lesson: Lesson, replaced: bool) -> None:
    """What was learned, how well it can be expected to work, and what to write in a policy."""
    entry, told = lesson.learned, lesson.figures
    rows = [
        ("positives", _number(told.positives, entry.positives)),
        ("negatives", _number(told.negatives, entry.negatives) + _background(entry.background)),
        *_figure_rows(told),
    ]
    title = f"{name}, as {entry.model} ({entry.model_sha256[:12]}) sees {entry.space} latents"
    _table(title, rows, "Measured on examples that were held out. " + _CAPTION)
    console = Console(highlight=False, soft_wrap=True)
    for warning in lesson.warnings:
        console.print(f"[yellow]![/yellow] {escape(visible(warning, 1000))}")
    console.print(f"wrote {escape(str(out))}" + (", replacing this model's entry" * replaced))
    console.print("\nUse it in a policy in the same folder:\n")
    console.print(escape(_snippet(name, out, told)))


def _snippet(name: str, out: Path, told: Figures) -> str:
    if told.at_rates:
        first = told.at_rates[0]
        threshold = f"{{margin: {first.margin:.4f}}}"
        why = f"at most {first.rate * 100:g} % of such negatives"
    else:
        threshold, why = "{probability: 0.5}", "calibrate it: latentguard calibrate"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "concept"
    return (
        f"  - id: {slug[:64]}\n"
        "    category: own\n"
        f"    examples: {out.name}\n"
        f"    threshold: {threshold}  # {why}\n"
        "    action: review\n"
    )


def tested_table(name: str, tested: Tested) -> None:
    """Figures of new examples, and those on the wrong side of the threshold."""
    told = tested.figures
    rows = [
        ("positives", f"{told.positives:,}"),
        ("negatives", f"{told.negatives:,}"),
        (f"recall at margin {tested.margin:.4f}", str(tested.recall)),
        ("false-positive rate there", str(tested.false_positive_rate)),
        *_figure_rows(told, even=False),
    ]
    _table(f"{name}, on new examples", rows, "[low, high]: 95 % interval")
    _list("missed", tested.missed)
    _list("negatives that matched", tested.matched)


def _list(what: str, found: Sequence[tuple[str, float]]) -> None:
    if not found:
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n{what}: {len(found):,}")
    for source, margin in found[:SHOWN]:
        console.print(f"  {margin:+.4f}  {escape(visible(source, 300))}")
    if len(found) > SHOWN:
        console.print(f"  and {len(found) - SHOWN:,} more (--format json lists all)")


def concept_table(concept: ConceptFile) -> None:
    """All entries of a concept's file."""
    table = Table(
        title=escape(visible(f"{concept.name} ({concept.sha256[:12]})", 300)),
        caption=escape(_CAPTION),
    )
    for column in ("model", "space", "positives", "negatives", "AUROC", "recall at 1 %", "sums"):
        table.add_column(column)
    notes = []
    for entry in concept.entries:
        parts = entry.figures.get("merged_from")
        area, recall = _said(entry.figures)
        label = f"{entry.model} ({entry.model_sha256[:12]})"
        counts = f"{entry.positives:,}", f"{entry.negatives:,}" + _background(entry.background)
        kept = "yes" if entry.statistics else "no"
        table.add_row(*(escape(visible(t, 300)) for t in (label, entry.space, *counts)),
                      area, recall, kept)  # fmt: skip
        if isinstance(parts, list):
            found = "; ".join(" and ".join(_said(part)) for part in parts)
            notes.append(
                f"{entry.model}: merged from {len(parts)} and not measured since; AUROC and recall "
                f"of the parts: {found}"
            )
        warnings = entry.figures.get("warnings")
        notes += [f"{entry.model}: {text}" for text in warnings] if warnings else []
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, soft_wrap=False)
    for note in notes:
        console.print(f"[yellow]![/yellow] {escape(visible(note, 1000))}")


def _said(figures: Any) -> tuple[str, str]:
    """AUROC and recall at the first rate as a file says them, which may be edited by hand."""
    try:
        validated = figures["validated"]
        rates = validated["at_false_positive_rate"]
        recall = _interval(rates[0]["recall"]) if rates else "too few negatives"
        return _interval(validated["auroc"]), recall
    except (KeyError, TypeError, ValueError, IndexError):
        return "not measured", "not measured"


def _interval(said: Mapping[str, Any]) -> str:
    value, low, high = (float(said[key]) for key in ("value", "low", "high"))
    return f"{value:.3f} \\[{low:.3f}, {high:.3f}]"


def _figure_rows(told: Figures, even: bool = True) -> list[tuple[str, str]]:
    rows = [("AUROC", str(told.auroc))]
    if even:
        rows += [
            ("recall at probability 0.5", str(told.at_even[0])),
            ("false-positive rate there", str(told.at_even[1])),
        ]
    for one in told.at_rates:
        at = f"margin {one.margin:.4f}, probability {one.probability:.3f}"
        rows.append((f"recall at {one.rate * 100:g} % false positives ({at})", str(one.recall)))
    for rate, number in told.needed:
        name = f"recall at {rate * 100:g} % false positives"
        rows.append((name, f"unknown: needs {number:,} different negatives"))
    return rows


def _number(different: int, given: int) -> str:
    return f"{given:,}" if different == given else f"{given:,}, of which {different:,} differ"


def _background(used: bool) -> str:
    return " (the package's photos)" if used else ""


def _table(title: str, rows: Sequence[tuple[str, str]], caption: str) -> None:
    table = Table(title=escape(visible(title, 300)), caption=escape(caption), show_header=False)
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    Console().print(table)
