"""Lengths and colors that all cards and histograms of a report share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np

from latentguard.scan.record import ScanRecord
from latentguard.scan.report_data import ReportData, Tally
from latentguard.scan.summary import ModelInfo

BARS = 40
"""Bars of a concept's histogram."""

_Value = TypeVar("_Value", float, np.ndarray)


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram, four units wide; `over` the threshold or not."""

    x: float
    height: float
    over: bool


@dataclass(frozen=True)
class Scales:
    """What all cards of a page share, so that lengths and colors compare across images.

    margin: margins are drawn from -margin to +margin. heat: heat maps are colored from
    heat below a concept's threshold to heat above it, in margins. thresholds: model (name, sha256)
    -> concept id -> threshold as a margin.
    """

    margin: float
    heat: float
    thresholds: Mapping[tuple[str, str], Mapping[str, float]]

    @classmethod
    def of(cls, data: ReportData, models: Sequence[ModelInfo]) -> Self:
        """Axes wide enough for every image, and heat colors for all but the most extreme cells."""
        ends = [0.02]
        for tally in data.tallies.values():
            if tally.kind == "margin" and tally.judged:
                values = (tally.highest, tally.lowest, tally.threshold)
                ends += [abs(v) for v in values if np.isfinite(v)]
        thresholds = {(m.id.name, m.id.sha256): m.thresholds for m in models}
        gaps = []
        for item in data.cards():
            model = item.record.model
            known = thresholds.get((model.name, model.sha256), {}) if model else {}
            gaps += [np.abs(h - known.get(k, 0.0)).ravel() for k, h in item.heats.items()]
        far = np.concatenate(gaps or [np.zeros(1)]).astype(np.float64)
        far = far[np.isfinite(far)]
        heat = float(np.percentile(far, 98)) if far.size else 0.0
        return cls(margin=1.05 * max(ends), heat=max(heat, 0.01), thresholds=thresholds)

    def place(self, value: float, kind: str) -> float:
        """Where a score or threshold stands on its axis, in percent."""
        return 100 * min(max(self._along(value, kind), 0.0), 1.0)

    def threshold(self, record: ScanRecord, concept: str) -> float:
        """The threshold as a margin; 0, where a concept ties with its contrast, if unknown."""
        model = (record.model.name, record.model.sha256) if record.model else ("", "")
        threshold = self.thresholds.get(model, {}).get(concept, 0.0)
        return threshold if np.isfinite(threshold) else 0.0

    def bars(self, tally: Tally) -> list[Bar]:
        """A histogram (square roots of counts, so that a single image stays visible)."""
        bins = len(tally.scores)
        centers = (np.arange(bins) + 0.5) / bins * 4 - 2
        along = BARS * self._along(centers, tally.kind)
        at = np.clip(along, 0, BARS - 1).astype(int)
        roots = np.sqrt(np.bincount(at, weights=tally.scores, minlength=BARS))
        threshold = BARS * self._along(tally.threshold, tally.kind)
        tallest = max(float(roots.max()), 1.0)
        return [
            Bar(4 * x + 0.5, max(20 * float(roots[x]) / tallest, 2.0), x + 0.5 >= threshold)
            for x in np.flatnonzero(roots).tolist()
        ]

    def _along(self, value: _Value, kind: str) -> _Value:
        """The part of the axis below a value: 0 at its low end, 1 at its high end."""
        return value if kind == "probability" else (value / self.margin + 1) / 2
