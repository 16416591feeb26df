"""How many images fell under which category of a published hazard scheme: counts that add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from latentguard.judge import Categories
from latentguard.scan.error_kinds import shortened
from latentguard.scan.record import ScanRecord
from latentguard.scan.text import visible

MAX_CLAUSE = 500
"""Characters of why a category was not checked."""


class Scheme(NamedTuple):
    """A published scheme, of one version."""

    name: str
    version: str


@dataclass
class CategoryCount:
    """Of one category.

    name: what people call it. flagged: images of which a concept of it matched. unscored: those of
    which none was judged. clause: why it was not checked, or not all of it, in some image; empty
    where it always was.
    """

    name: str
    flagged: int = 0
    unscored: int = 0
    clause: str = ""

    def called(self, category: str) -> str:
        """A category's id, and its name where that is another one."""
        return visible(category if self.name == category else f"{category} ({self.name})")


@dataclass
class CategoryCounts:
    """Counts images by the categories of hazard schemes, if their records have them. The sum is the
    same in any order and grouping."""

    schemes: dict[Scheme, dict[str, CategoryCount]] = field(default_factory=dict)

    def add(self, record: ScanRecord) -> None:
        """Count one image."""
        for found in record.verdict.taxonomies:
            counts = self.schemes.setdefault(Scheme(found.scheme, found.version), {})
            for category in found.names:
                _count(counts, category, found)

    def merge(self, other: CategoryCounts) -> None:
        """Add another's counts."""
        for scheme, theirs in other.schemes.items():
            ours = self.schemes.setdefault(scheme, {})
            for category, more in theirs.items():
                count = ours.setdefault(category, CategoryCount(more.name))
                count.name = max(count.name, more.name)
                count.flagged += more.flagged
                count.unscored += more.unscored
                count.clause = max(count.clause, more.clause)

    def lines(self) -> Iterator[str]:
        """For each scheme the categories with flagged images, and what was not checked and why."""
        for scheme, counts in self.schemes.items():
            parts = [f"{c.called(name)} {c.flagged:,}" for name, c in counts.items() if c.flagged]
            called = f"{visible(scheme.name)} {visible(scheme.version)}"
            yield f"{called}, flagged images: {', '.join(parts) or 'none'}"
            alike: dict[tuple[str, str], list[str]] = {}
            for name, count in counts.items():
                if count.clause:
                    alike.setdefault((extent(count), count.clause), []).append(count.called(name))
            for (how, clause), names in alike.items():
                because = visible(clause, 300)
                yield f"{visible(scheme.name)}: {how}, as {because}: {', '.join(names)}"


def extent(count: CategoryCount) -> str:
    """How much of a category was not checked."""
    return f"not checked in {count.unscored:,}" if count.unscored else "not wholly checked"


def _count(counts: dict[str, CategoryCount], category: str, found: Categories) -> None:
    count = counts.setdefault(category, CategoryCount(found.names[category]))
    count.flagged += category in found.flagged
    count.unscored += found.scores[category] is None
    clause = found.unchecked.get(category)
    if clause is not None:
        count.clause = max(count.clause, shortened(clause, MAX_CLAUSE))
