"""The data of the report: what is kept of each image while a scan runs. Nothing here is HTML."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from latentguard.deprecated import former_keywords
from latentguard.judge import Rules
from latentguard.scan.image import rgb_png
from latentguard.scan.record import ScanRecord
from latentguard.scan.shortlist import Shortlist

HEATS = 4
"""Heat maps kept of an image: of the concepts that matched and those that came closest."""

BINS = 400
"""Bins of a concept's scores over [-2, 2], which holds every probability and margin."""


@dataclass
class Card:
    """What the report keeps of one image: kilobytes, whatever the size of its latents."""

    order: int
    record: ScanRecord
    preview: bytes | None
    heats: dict[str, np.ndarray]


@dataclass
class Tally:
    """The scores of one concept over all images, shown or not."""

    kind: str
    scores: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    matched: int = 0
    judged: int = 0
    highest: float = -np.inf
    lowest: float = np.inf
    threshold: float = np.nan


class ReportData:
    """Collects records, at most `max_cards` of them as cards.

    Every image is counted. Beyond those what was not allowed is kept before what was.
    """

    @former_keywords(limit="max_cards")
    def __init__(self, rules: Rules, max_cards: int = 1000) -> None:
        self.rules = rules
        self.tallies = {
            rule.id: Tally("probability" if rule.threshold.kind == "probability" else "margin")
            for rule in rules.concepts
        }
        self._kept = Shortlist(max_cards)
        self._pictures: dict[int, tuple[bytes | None, dict[str, np.ndarray]]] = {}

    def add(self, record: ScanRecord) -> None:
        """Count one image and keep its card if there is room."""
        self._count(record)
        order, dropped = self._kept.add(record)
        if dropped is not None:
            del self._pictures[dropped]
        if order is not None:
            self._pictures[order] = _pictures(record)

    def cards(self) -> list[Card]:
        """The gravest first, within one outcome in the order of the scan."""
        grave = {"block": 0, "steer": 1, "review": 2, "error": 3, "allow": 4}
        cards = [Card(n, record, *self._pictures[n]) for n, record in self._kept.in_order()]
        return sorted(cards, key=lambda card: grave[card.record.outcome])

    def _count(self, record: ScanRecord) -> None:
        for concept in record.verdict.concepts:
            tally = self.tallies.get(concept.id)
            if tally is None or not concept.covered:
                continue
            score = concept.score
            tally.judged += 1
            tally.matched += concept.matched
            tally.highest = max(tally.highest, score)
            tally.lowest = min(tally.lowest, score)
            tally.threshold = concept.threshold_value
            tally.scores[min(max(int((score + 2) / 4 * BINS), 0), BINS - 1)] += 1


def _pictures(record: ScanRecord) -> tuple[bytes | None, dict[str, np.ndarray]]:
    """The preview as PNG, and the heat maps of the concepts that stand first."""
    preview = rgb_png(record.preview) if record.preview is not None else None
    heats = record.heatmaps or {}
    shown = [c.id for c in record.ranked if c.covered and c.id in heats][:HEATS]
    return preview, {name: heats[name].astype(np.float16) for name in shown}
