"""What a concept's file does on examples that it was not learned from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from latentguard.encoders import Encoder
from latentguard.encoders.examples import whole
from latentguard.errors import UsageError
from latentguard.evaluate.metrics import Interval, wilson
from latentguard.learn.examples import Examples
from latentguard.learn.figures import Figures, figures
from latentguard.policy.examples import Learned


@dataclass(frozen=True)
class Tested:
    """A head on new examples.

    figures: AUROC, and recall at false-positive rates with thresholds from these very negatives.
    margin: the threshold that was asked for. recall, false_positive_rate: there.
    missed, matched: (name, margin) of the positives below it, the lowest first, and of the
        negatives at or above it, the highest first.
    """

    figures: Figures
    margin: float
    recall: Interval
    false_positive_rate: Interval
    missed: tuple[tuple[str, float], ...]
    matched: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; intervals as `Figures.to_dict` has them."""
        return {
            "figures": self.figures.to_dict(),
            "margin": self.margin,
            "recall": asdict(self.recall),
            "false_positive_rate": asdict(self.false_positive_rate),
            "missed": [{"name": name, "margin": margin} for name, margin in self.missed],
            "matched": [{"name": name, "margin": margin} for name, margin in self.matched],
        }


def try_out(
    learned: Learned,
    positives: Examples,
    negatives: Examples,
    encoder: Encoder,
    margin: float = 0.0,
) -> Tested:
    """Margins of new examples against a threshold; the encoder is the one that the entry is for
    (`ConceptFile.entry`)."""
    high, low = (
        side.rows.astype(np.float64) @ learned.weight.astype(np.float64) + learned.bias
        for side in (positives, negatives)
    )
    return Tested(
        figures(high, low, whole(encoder).logit_scale),
        margin,
        wilson(int((high >= margin).sum()), len(high)),
        wilson(int((low >= margin).sum()), len(low)),
        tuple((positives.names[i], float(high[i])) for i in np.argsort(high) if high[i] < margin),
        tuple((negatives.names[i], float(low[i])) for i in np.argsort(-low) if low[i] >= margin),
    )


def margin_of(probability: float | None, margin: float | None, logit_scale: float) -> float:
    """A threshold as a margin; a probability of 0.5 where none is given.

    Raises UsageError for both, or a probability that is not between 0 and 1.
    """
    if margin is not None:
        if probability is not None:
            raise UsageError("give --probability or --margin, not both")
        return margin
    chance = 0.5 if probability is None else probability
    if not 0 < chance < 1:
        raise UsageError(f"--probability must be above 0 and below 1, got {chance:g}")
    return math.log(chance / (1 - chance)) / logit_scale
