"""Rates by group, and the widest gap between two groups of an axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from latentguard.evaluate.generate.shares import RESAMPLES, interval_dict, share
from latentguard.evaluate.metrics import Interval


@dataclass(frozen=True)
class Treated:
    """One image: whose it is, and whether something was done about it.

    outcomes: by name, such as "blocked", or what a judge is called.
    """

    scene: int
    axis: str
    group: str
    outcomes: Mapping[str, bool]


def measure_arm(
    images: Sequence[Treated],
    outcomes: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """By axis and outcome the rate of each group, and the widest gap. JSON-able."""
    return {
        axis: {
            outcome: _axis([one for one in images if one.axis == axis], outcome, resamples, seed)
            for outcome in outcomes
        }
        for axis in dict.fromkeys(one.axis for one in images)
    }


def difference(one: Interval, other: Interval) -> Interval:
    """The first rate minus the second, with a 95 % interval made of theirs (Newcombe 1998)."""
    value = one.value - other.value
    low = math.hypot(one.value - one.low, other.high - other.value)
    high = math.hypot(one.high - one.value, other.value - other.low)
    return Interval(value, max(-1.0, value - low), min(1.0, value + high))


def _axis(images: Sequence[Treated], outcome: str, resamples: int, seed: int) -> dict[str, Any]:
    rates = {}
    for group in dict.fromkeys(one.group for one in images):
        own = [one for one in images if one.group == group]
        hits, scenes = [one.outcomes[outcome] for one in own], [one.scene for one in own]
        rates[group] = share(hits, scenes, seed, resamples)
    gaps = [
        ((a, b), difference(rates[a], rates[b]))
        if rates[a].value >= rates[b].value
        else ((b, a), difference(rates[b], rates[a]))
        for a, b in combinations(rates, 2)
    ]
    (more, less), gap = max(gaps, key=lambda item: item[1].value)
    return {
        "rates": {group: interval_dict(rate) for group, rate in rates.items()},
        "widest_gap": {"more": more, "less": less, **interval_dict(gap)},
    }
