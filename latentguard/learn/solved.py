"""A head and all that it follows from: the sums of both sides, a shrinkage, and a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from latentguard.learn.heads import solve
from latentguard.learn.platt import Scale
from latentguard.learn.statistics import Array, Sums


@dataclass(frozen=True, eq=False)
class Solved:
    """What a margin is made of: (slope * score + offset) / logit scale, of the head's score.

    positives: sums of the positives. own: of negatives that were given, if any. background: of
        those of the package, if they are used; one of the two is there.
    shrinkage: of the covariance. scale: from scores to log odds. logit_scale: of the model.
    """

    positives: Sums
    own: Sums | None
    background: Sums | None
    shrinkage: float
    scale: Scale
    logit_scale: float

    @property
    def negatives(self) -> Sums:
        """Sums of all negatives."""
        parts = [part for part in (self.own, self.background) if part is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def head(self) -> tuple[Array, float]:
        """Weight [F] and bias of the margin."""
        raw = solve(self.positives, self.negatives, self.shrinkage)
        slope, offset = self.scale.slope, self.scale.offset
        level = self.logit_scale
        return raw.weight * slope / level, (raw.bias * slope + offset) / level

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """What a file keeps of it: all but the sums of the background, which the package has."""
        numbers = [self.scale.slope, self.scale.offset, self.shrinkage, self.logit_scale]
        kept = {"scale": np.array(numbers), **self.positives.to_arrays("positives")}
        return kept if self.own is None else kept | self.own.to_arrays("negatives")

    @classmethod
    def from_arrays(
        cls, kept: Mapping[str, NDArray[Any]], background: Sums | None, features: int
    ) -> Self:
        """From what a file keeps, for vectors of so many features.

        Raises ValueError or KeyError for what `to_arrays` did not make.
        """
        slope, offset, shrinkage, level = map(float, kept["scale"])
        if not (0 < shrinkage <= 1 and slope >= 0 and level > 0):
            raise ValueError("its scale is none")
        positives = Sums.from_arrays("positives", kept)
        own = Sums.from_arrays("negatives", kept) if "negatives.count" in kept else None
        if own is None and background is None:
            raise ValueError("it has no negatives")
        for sums in (positives, own, background):
            if sums is not None and sums.mean.shape != (features,):
                raise ValueError("its sums are of other features than its head")
        return cls(positives, own, background, shrinkage, Scale(slope, offset), level)
