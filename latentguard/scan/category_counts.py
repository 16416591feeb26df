"""How many images fell under which category of a published hazard scheme, in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from latentguard.judge import Categories
from latentguard.scan.record import ScanRecord
from latentguard.scan.text import visible


class CategoryCounts:
    """Counts what records say in the words of schemes, where they do."""

    def __init__(self) -> None:
        self._flagged: Counter[tuple[str, str]] = Counter()
        self._unscored: Counter[tuple[str, str]] = Counter()
        self._clauses: dict[tuple[str, str], str] = {}
        self._schemes: dict[str, Categories] = {}

    def add(self, record: ScanRecord) -> None:
        """Count one image."""
        for found in record.verdict.taxonomies:
            self._schemes.setdefault(found.scheme, found)
            for category, score in found.scores.items():
                place = (found.scheme, category)
                self._flagged[place] += category in found.flagged
                self._unscored[place] += score is None
            for category, clause in found.unchecked.items():
                self._clauses.setdefault((found.scheme, category), clause)

    def lines(self) -> Iterator[str]:
        """For each scheme the categories with flagged images, and what was not checked and why."""
        for scheme, first in self._schemes.items():
            counts = {c: self._flagged[scheme, c] for c in first.names}
            parts = [f"{_called(first, c)} {n:,}" for c, n in counts.items() if n]
            called = f"{visible(scheme)} {visible(first.version)}"
            yield f"{called}, flagged images: {', '.join(parts) or 'none'}"
            alike: dict[tuple[str, str], list[str]] = {}
            for category in first.names:
                clause = self._clauses.get((scheme, category))
                if clause is not None:
                    unscored = self._unscored[scheme, category]
                    extent = f"not checked in {unscored:,}" if unscored else "not wholly checked"
                    alike.setdefault((extent, clause), []).append(_called(first, category))
            for (extent, clause), names in alike.items():
                yield f"{visible(scheme)}: {extent}, as {visible(clause, 300)}: {', '.join(names)}"


def _called(found: Categories, category: str) -> str:
    """A category's id, and its name where that is another one."""
    name = found.names[category]
    return visible(category if name == category else f"{category} ({name})")
