"""What other thresholds would do: how many images would match, read off a concept's histogram."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from latentguard.scan.concept_tally import ConceptTally

_PROBABILITIES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_ROWS = 8


class Alternative(NamedTuple):
    """One threshold, and how many of the images judged are at or above it.

    It is at least `low` and at most `high`. The two are equal at the edge of a bin, and at the
    threshold in force.
    """

    threshold: float
    low: int
    high: int
    in_force: bool = False


def alternative(concept: ConceptTally, threshold: float) -> Alternative:
    """What one threshold, in the unit of the concept's own, would match."""
    if threshold == concept.threshold_value:
        return Alternative(threshold, concept.matched, concept.matched, True)
    low, high = concept.scores.at_least(threshold)
    # What is known of the one in force bounds those above and below it.
    if threshold < concept.threshold_value:
        return Alternative(threshold, max(low, concept.matched), max(high, concept.matched))
    if threshold > concept.threshold_value:
        return Alternative(threshold, min(low, concept.matched), min(high, concept.matched))
    return Alternative(threshold, low, high)


def alternatives(concept: ConceptTally) -> list[Alternative]:
    """The threshold in force among others, ascending. Empty if no image was judged.

    Probabilities are the same ones for all concepts; margins are round numbers over the range of
    the scores.
    """
    if not concept.judged:
        return []
    values = set(_PROBABILITIES if concept.unit == "probability" else _round_margins(concept))
    if math.isfinite(concept.threshold_value):
        values.add(concept.threshold_value)
    return [alternative(concept, value) for value in sorted(values)]


def curve(concept: ConceptTally) -> list[tuple[float, int]]:
    """Thresholds, ascending, and how many images each would match, exactly: the edges of bins.

    From the last edge at which all of them match to the first at which none does.
    """
    counts = concept.scores.counts
    filled = np.flatnonzero(counts)
    if not filled.size:
        return []
    first, last = int(filled[0]), int(filled[-1])
    above = [*counts[first : last + 1][::-1].cumsum()[::-1].tolist(), 0]
    edges = concept.scores.bins.edges[first : last + 2].tolist()
    return list(zip(edges, above, strict=True))


def _round_margins(concept: ConceptTally) -> list[float]:
    reach = max(concept.highest - concept.lowest, 1e-3)
    step = round_step(reach / _ROWS)
    first, last = math.ceil(concept.lowest / step), math.floor(concept.highest / step)
    return [round(n * step, 10) for n in range(first, last + 1)]


def round_step(step: float) -> float:
    """The next of 1, 2, 5, 10 ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step * (1 - 1e-9))
