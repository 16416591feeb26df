"""Histograms of scores in fixed bins, so that those of any two shards can be added.

Margins: 878 bins from -2 to 2, uniform in asinh(margin / 0.05): half a thousandth wide at 0, one
percent of the margin far from it. Probabilities: 1,024 bins of 1/32 of a logit, 0.008 wide at 0.5,
0.0028 at 0.9 and 0.0003 at 0.99; the first and the last lie beyond 1e-7 and 1 - 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KNEE = 0.05
_PER_UNIT = 100
_LOGITS = 16
_PER_LOGIT = 32
_MOST_WAITING = 4096


@dataclass(frozen=True)
class Bins:
    """Bins of one unit. edges: float64 [bins + 1], ascending.

    What lies outside of them counts in the first and the last bin.
    """

    unit: str
    edges: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def place(self, value: float) -> int:
        """The bin that a value is counted in: edges[i] <= value < edges[i + 1]."""
        return int(np.clip(np.searchsorted(self.edges, value, "right") - 1, 0, len(self) - 1))

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_unit, (self.unit,)  # copies and pickles are the same object, not its edges


def _margin_edges() -> NDArray[np.float64]:
    most = int(np.ceil(np.arcsinh(2 / _KNEE) * _PER_UNIT))
    return _KNEE * np.sinh(np.arange(-most, most + 1) / _PER_UNIT)


def _probability_edges() -> NDArray[np.float64]:
    logits = np.arange(-_LOGITS * _PER_LOGIT, _LOGITS * _PER_LOGIT + 1) / _PER_LOGIT
    edges = 1 / (1 + np.exp(-logits))
    edges[0], edges[-1] = 0.0, 1.0
    return np.asarray(edges)


MARGINS = Bins("margin", _margin_edges())
PROBABILITIES = Bins("probability", _probability_edges())


def _of_unit(unit: str) -> Bins:
    return MARGINS if unit == MARGINS.unit else PROBABILITIES


class Histogram:
    """Counts of values in fixed bins. Adding is cheap: values wait, and are counted in batches."""

    def __init__(self, bins: Bins) -> None:
        self.bins = bins
        self._counts: NDArray[np.int64] = np.zeros(len(bins), np.int64)
        self._waiting: list[float] = []

    def add(self, value: float) -> None:
        """Count one finite value."""
        self._waiting.append(value)
        if len(self._waiting) >= _MOST_WAITING:
            self._count()

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram with the same bins."""
        assert self.bins is other.bins
        self._count()
        self._counts += other.counts

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 [bins]."""
        self._count()
        return self._counts

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def at_least(self, value: float) -> tuple[int, int]:
        """How many values are at or above `value`: at least the first, at most the second number.

        The two differ by the count of the bin that contains `value`, and are equal at an edge.
        """
        edges, counts = self.bins.edges, self.counts
        if value <= edges[0]:
            return self.total, self.total
        if value > edges[-1]:
            return 0, 0
        above = int(np.searchsorted(edges, value, "left"))  # the first edge at or above it
        sure = int(counts[above:].sum())
        exact = edges[above] == value and above < len(counts)  # the last bin has its upper edge
        return sure, sure if exact else sure + int(counts[above - 1])

    def to_dict(self) -> dict[str, Any]:
        """The number of the `first` bin that is not empty, and `counts` from it to the last one."""
        filled = np.flatnonzero(self.counts)
        if not filled.size:
            return {"first": 0, "counts": []}
        first, last = int(filled[0]), int(filled[-1])
        return {"first": first, "counts": self.counts[first : last + 1].tolist()}

    @classmethod
    def of(cls, bins: Bins, first: int, counts: Sequence[int]) -> Histogram:
        """What `to_dict` gave. Raises ValueError where it does not fit into these bins."""
        if first + len(counts) > len(bins):
            raise ValueError(f"must fit into {len(bins)} bins")
        made = cls(bins)
        made._counts[first : first + len(counts)] = counts
        return made

    def _count(self) -> None:
        if self._waiting:
            at = np.searchsorted(self.bins.edges, self._waiting, "right") - 1
            bins = np.clip(at, 0, len(self.bins) - 1)
            self._counts += np.bincount(bins, minlength=len(self.bins))
            self._waiting.clear()
