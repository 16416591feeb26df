"""The table on a terminal: one row per image, at most a few hundred of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from latentguard.deprecated import former_keywords
from latentguard.judge import ConceptScore
from latentguard.scan.category_counts import CategoryCounts
from latentguard.scan.record import ScanRecord
from latentguard.scan.shortlist import Shortlist
from latentguard.scan.text import visible

STYLES = {
    "block": "bold red",
    "steer": "bold blue",
    "review": "bold yellow",
    "error": "bold magenta",
    "allow": "green",
}
SIGNS = {"block": "✕", "steer": "↻", "review": "!", "error": "?", "allow": "✓"}

WIDTH = 120
"""Columns where the output is no terminal."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command; rich would exit with 1, which is what a match does."""
        raise BrokenPipeError


class Table:
    """Keeps rows until the end, at most `max_rows`; those not allowed before the others."""

    @former_keywords(limit="max_rows")
    def __init__(self, file: TextIO, max_rows: int = 500) -> None:
        width = None if file.isatty() else WIDTH
        self._console = _Console(file=file, highlight=False, emoji=False, width=width)
        self._rows = Shortlist(max_rows)
        self._unseen: dict[str, tuple[ConceptScore, ...]] = {}
        self._categories = CategoryCounts()

    def add(self, record: ScanRecord) -> None:
        self._rows.add(record)
        self._categories.add(record)
        unseen = tuple(c for c in record.verdict.concepts if c.unseen or not c.covered)
        if unseen and record.judged_by:
            self._unseen.setdefault(record.judged_by.name, unseen)

    def close(self) -> None:
        rows = self._rows.in_order()
        if not rows:
            return
        sources = {record.source for _, record in rows}
        one = sources.pop() if len(sources) == 1 else None
        table = RichTable(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title=Text(visible(one)) if one else None,
            title_justify="left",
            title_style="dim",
        )
        table.add_column("Image", max_width=40, overflow="fold")
        table.add_column("Decision", no_wrap=True)
        table.add_column("Concept", max_width=24, overflow="fold")
        table.add_column("Score", no_wrap=True)
        table.add_column("Why", overflow="fold")
        for _, record in rows:
            table.add_row(*_cells(record, with_source=one is None))
        self._console.print(table)
        for line in self._remarks(len(rows)):
            self._console.print(Text(line, style="dim"))

    def _remarks(self, shown: int) -> Iterator[str]:
        for model, concepts in sorted(self._unseen.items()):
            names = [c.id for c in concepts if not c.covered]
            noun, them = ("concept was", "it") if len(names) == 1 else ("concepts were", "them")
            if names:
                yield (
                    f"{len(names)} {noun} not checked, as {visible(model)} cannot see {them}: "
                    f"{', '.join(map(visible, names))}"
                )
            for concept in concepts:
                if concept.covered:
                    prompts = ", ".join(visible(prompt, 80) for prompt in concept.unseen)
                    noun = "prompt" if len(concept.unseen) == 1 else "prompts"
                    yield (
                        f"{visible(model)} cannot see, and did not check, {noun} of "
                        f"{visible(concept.id)}: {prompts}"
                    )
        yield from self._categories.lines()
        if shown < self._rows.seen:
            yield (
                f"{shown:,} of {self._rows.seen:,} images are shown, those not allowed before the "
                "others; --format json or csv has all of them"
            )


def _cells(record: ScanRecord, with_source: bool) -> tuple[Text, Text, Text, Text, Text]:
    lead = record.leading
    outcome = record.outcome
    decision = Text(f"{SIGNS[outcome]} {record.verdict.decision}", style=STYLES[outcome])
    if lead is None or record.failed:
        why = Text(visible(record.verdict.error or record.verdict.reason, 300))
        kind = Text("error" if record.failed else "")
        return _image(record, with_source), decision, kind, Text(), why
    others = sum(c.matched for c in record.ranked) - 1
    concept = Text(visible(lead.id) + (f" +{others}" if others > 0 else ""))
    score = Text(f"{lead.score:.3f} {'≥' if lead.matched else '<'} {lead.threshold_value:.3f}")
    why = Text(f"{'matches' if lead.matched else 'closest:'} {visible(lead.prompt, 80)}")
    if not lead.matched:
        for text in (concept, score, why):
            text.stylize("dim")
    return _image(record, with_source), decision, concept, score, why


def _image(record: ScanRecord, with_source: bool) -> Text:
    """The id, else the place in the file; the file too where there are several."""
    place = f"[{record.index}]"
    if not with_source:
        return Text(visible(record.id, 60) if record.id else place)
    text = Text(visible(record.id, 60) if record.id else "")
    source = f"{visible(record.source, 80)}{place}"
    return text.append(f" {source}" if record.id else source, style="dim" if record.id else "")
