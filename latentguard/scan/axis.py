"""Where scores stand on the axes that all concepts of a run's report share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from latentguard.scan.alternatives import round_step
from latentguard.scan.concept_tally import ConceptTally

BARS = 96
"""Bars of a histogram over the whole axis."""

# The most important ones come first. A label too close to an earlier one is left out.
_TICKS = (0.5, 0.01, 0.99, 1e-4, 0.9999, 0.1, 0.9, 1e-6, 1 - 1e-6)
_APART = 11


@dataclass(frozen=True)
class Tick:
    """A label at a place of the axis, in percent."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """The axis of one unit. low, high: its ends; of probabilities as logits, where those near 0
    and 1 have room."""

    unit: str
    low: float
    high: float

    @classmethod
    def of(cls, unit: str, concepts: Iterable[ConceptTally]) -> Self:
        """Wide enough for all scores and thresholds of concepts of that unit."""
        ends: list[float] = []
        for concept in concepts:
            if concept.unit == unit and concept.judged:
                edges = concept.scores.bins.edges
                filled = np.flatnonzero(concept.scores.counts)
                ends += [float(edges[filled[0]]), float(edges[filled[-1] + 1])]
                ends += [t for t in (concept.threshold_value,) if math.isfinite(t)]
        along = [_scaled(unit, value) for value in ends] or [0.0]
        low, high = min(along), max(along)
        room = 0.03 * (high - low) or 0.05
        return cls(unit, low - room, high + room)

    def place(self, value: float) -> float:
        """Where a score stands, in percent from the low end."""
        part = (_scaled(self.unit, value) - self.low) / (self.high - self.low)
        return 100 * min(max(part, 0.0), 1.0)

    def ticks(self) -> list[Tick]:
        """Labels, few enough to be read on a phone."""
        if self.unit == "probability":
            kept: list[Tick] = []
            for p in _TICKS:
                at = self.place(p)
                inside = self.low <= _scaled(self.unit, p) <= self.high
                if inside and all(abs(at - tick.at) >= _APART for tick in kept):
                    kept.append(Tick(at, _label(p)))
            return kept
        step = round_step((self.high - self.low) / 4)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        values = [round(n * step, 10) for n in range(first, last + 1)]
        return [Tick(self.place(v), f"{v:g}".replace("-", "−")) for v in values]

    def bars(self, concept: ConceptTally) -> NDArray[np.int64]:
        """Counts in `BARS` equal parts of the axis."""
        edges = concept.scores.bins.edges
        middles = [self.place(float(v)) for v in (edges[1:] + edges[:-1]) / 2]
        at = np.minimum((np.array(middles) / 100 * BARS).astype(np.int64), BARS - 1)
        made = np.zeros(BARS, np.int64)
        np.add.at(made, at, concept.scores.counts)
        return made


def _scaled(unit: str, value: float) -> float:
    if unit != "probability":
        return value
    inside = min(max(value, 1e-7), 1 - 1e-7)
    return math.log(inside / (1 - inside))


def _label(p: float) -> str:
    if p < 0.001:
        return f"10{_superscript(round(math.log10(p)))}"
    return f"{p:.4f}".rstrip("0") if p < 0.99999 else f"1−10{_superscript(-6)}"


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
