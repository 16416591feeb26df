"""The scores of one model for the concepts of a policy, as counts that can be added."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from latentguard.judge import ModelId
from latentguard.scan.bins import MARGINS, PROBABILITIES, Histogram

MAX_EXAMPLES = 12
"""Gravest examples of a concept in a merged tally; each shard contributes its own few."""

MAX_ID, MAX_SOURCE, MAX_NOTES = 300, 1000, 20_000
"""Characters of an example's id and source, and of what is said about a model."""


class Judge(NamedTuple):
    """A model on the latents of one space: its scores are comparable. Empty if unknown."""

    name: str
    sha256: str
    space: str

    @property
    def model(self) -> ModelId:
        return ModelId(self.name, self.sha256)


class Example(NamedTuple):
    """One image that scored high. place: its number in its source. preview: PNG, or None."""

    margin: float
    probability: float
    source: str
    place: int
    id: str | None
    preview: bytes | None


def gravest_first(example: Example) -> tuple[float, str, int, bool, str, float, bytes]:
    """A total order of examples by their margins. It does not depend on the order they came in."""
    margin, probability, source, place, name, preview = example
    return -margin, source, place, name is None, name or "", -probability, preview or b""


@dataclass
class ConceptTally:
    """What one judge gave one concept.

    threshold: as in `ConceptScore`; the same for all images of a judge. judged, matched: images.
    unchecked: images for which the concept was not judged, as the judge cannot see it. unseen: its
    prompts that the judge cannot see. highest, lowest: margins, infinite where none was judged.
    """

    category: str
    action: str
    threshold: dict[str, str | float]
    judged: int = 0
    matched: int = 0
    unchecked: int = 0
    highest: float = -math.inf
    lowest: float = math.inf
    margins: Histogram = field(default_factory=lambda: Histogram(MARGINS))
    probabilities: Histogram = field(default_factory=lambda: Histogram(PROBABILITIES))
    unseen: frozenset[str] = frozenset()
    gravest: list[Example] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What the threshold is compared with: `probability` or `margin`."""
        return "probability" if self.threshold["kind"] == "probability" else "margin"

    @property
    def threshold_value(self) -> float:
        """The threshold in that unit; NaN where none could be resolved."""
        key = "margin" if self.threshold["kind"] == "fpr" else "value"
        return float(self.threshold.get(key, math.nan))

    @property
    def scores(self) -> Histogram:
        """The histogram of that unit."""
        return self.probabilities if self.unit == "probability" else self.margins

    def same_rule(self, other: ConceptTally) -> bool:
        """Whether both were judged by the same words."""
        return (self.category, self.action, self.threshold) == (
            other.category,
            other.action,
            other.threshold,
        )

    def merge(self, other: ConceptTally) -> None:
        """Add another's counts; `same_rule` holds."""
        self.judged += other.judged
        self.matched += other.matched
        self.unchecked += other.unchecked
        self.highest = max(self.highest, other.highest)
        self.lowest = min(self.lowest, other.lowest)
        self.margins.merge(other.margins)
        self.probabilities.merge(other.probabilities)
        self.unseen |= other.unseen
        both = sorted(self.gravest + other.gravest, key=gravest_first)
        self.gravest = both[:MAX_EXAMPLES]


@dataclass
class JudgeTally:
    """What one judge gave: `images`, and each concept by its id.

    notes: what the model's makers say about it. unseen_contrast: contrast prompts that it cannot
    see. Both are empty where nobody said (`Tally.note_model`).
    """

    images: int = 0
    notes: str = ""
    unseen_contrast: frozenset[str] = frozenset()
    concepts: dict[str, ConceptTally] = field(default_factory=dict)
