"""What held-out scores say of a head, with intervals, and what they are too few to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from latentguard.evaluate.calibrate import images_needed, threshold
from latentguard.evaluate.metrics import Interval, auroc, auroc_interval, count, wilson

RATES = (0.01, 0.001)
"""False-positive rates at which recall is told."""


@dataclass(frozen=True)
class AtRate:
    """What a threshold at a false-positive rate finds.

    margin: the lowest one that a further negative reaches with at most that probability
        (`evaluate.calibrate.threshold`). probability: the same. recall: of the positives.
    """

    rate: float
    margin: float
    probability: float
    recall: Interval


@dataclass(frozen=True)
class Figures:
    """What examples that a head did not see say of it.

    auroc: the chance that a positive scores above a negative.
    at_even: recall and false-positive rate at probability 0.5.
    at_rates: for the false-positive rates that there are negatives enough for.
    needed: for the other rates, how many negatives they need.
    positives, negatives: how many different examples this is from; those that show nearly the same
        count once.
    """

    auroc: Interval
    at_even: tuple[Interval, Interval]
    at_rates: tuple[AtRate, ...]
    needed: tuple[tuple[float, int], ...]
    positives: int
    negatives: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; an interval is {"value", "low", "high"}, of 95 %."""
        return {
            "auroc": asdict(self.auroc),
            "at_probability_0.5": {
                "recall": asdict(self.at_even[0]),
                "false_positive_rate": asdict(self.at_even[1]),
            },
            "at_false_positive_rate": [asdict(one) for one in self.at_rates],
            "negatives_needed": [
                {"rate": rate, "negatives": number} for rate, number in self.needed
            ],
            "positives": self.positives,
            "negatives": self.negatives,
        }


def figures(positives: ArrayLike, negatives: ArrayLike, logit_scale: float) -> Figures:
    """Figures of margins [P] and [N] of different examples.

    Raises ValueError for an empty side, or margins that are not finite.
    """
    high, low = np.asarray(positives, np.float64), np.asarray(negatives, np.float64)
    area = float(auroc(count(high, low)))
    rates, needed = [], []
    for rate in RATES:
        if len(low) < images_needed(rate):
            needed.append((rate, images_needed(rate)))
            continue
        margin = threshold(low, rate)
        chance = float(1 / (1 + np.exp(-logit_scale * margin)))
        hits = int((high >= margin).sum())
        rates.append(AtRate(rate, margin, chance, wilson(hits, len(high))))
    even = tuple(wilson(int((side >= 0).sum()), len(side)) for side in (high, low))
    interval = auroc_interval(area, len(high), len(low))
    return Figures(interval, (even[0], even[1]), tuple(rates), tuple(needed), len(high), len(low))


def interval_of(said: dict[str, Any]) -> Interval:
    """An interval that `to_dict` wrote."""
    return Interval(float(said["value"]), float(said["low"]), float(said["high"]))


def rates_needed(negatives: int) -> Sequence[float]:
    """The false-positive rates that so many negatives are too few for."""
    return [rate for rate in RATES if negatives < images_needed(rate)]
