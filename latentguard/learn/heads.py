"""A linear head from sums, in closed form: discriminant analysis with a shrunk covariance.

The covariance within the two sides is moved toward a multiple of the identity, as far as
`shrinkage` says (Friedman 1989; Ledoit and Wolf 2004). At 1 nothing is left of it, and the head is
the difference of the two means: the nearest prototype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from latentguard.learn.statistics import Array, Sums


@dataclass(frozen=True, eq=False)
class Raw:
    """A head before its scores are probabilities: the mean negative scores 0, the mean positive 1.

    weight: [F] float64. bias: of the score.
    """

    weight: Array
    bias: float

    def __call__(self, rows: ArrayLike) -> Array:
        """Scores [n] of vectors [n, F]."""
        scores: Array = np.asarray(rows, np.float64) @ self.weight + self.bias
        return scores


def solve(positives: Sums, negatives: Sums, shrinkage: float) -> Raw:
    """The head of one shrinkage, above 0 and at most 1.

    Raises ValueError where the two means are the same.
    """
    return next(solutions(positives, negatives, (shrinkage,)))


def solutions(positives: Sums, negatives: Sums, shrinkages: Iterable[float]) -> Iterator[Raw]:
    """The heads of several shrinkages; what is costly about them is done once."""
    apart = positives.mean - negatives.mean
    count = positives.count + negatives.count
    factor = np.concatenate([positives.factor, negatives.factor]) / count**0.5
    values, axes = _principal(factor)
    mean = (factor * factor).sum() / factor.shape[1] or 1.0
    along = axes @ apart
    for shrinkage in shrinkages:
        kept, floor = (1 - shrinkage) * values, shrinkage * mean
        weight = (apart - (along * kept / (kept + floor)) @ axes) / floor
        length = float(weight @ apart)
        if not length > 0:
            raise ValueError("the two means are the same")
        weight = weight / length
        yield Raw(weight, -float(weight @ negatives.mean))


def _principal(factor: Array) -> tuple[Array, Array]:
    """Variances [r] and unit axes [r, F] of the scatter that a factor [n, F] stands for."""
    rows, columns = factor.shape
    if rows >= columns:
        values, vectors = np.linalg.eigh(factor.T @ factor)
        return np.clip(values, 0, None), vectors.T
    values, vectors = np.linalg.eigh(factor @ factor.T)
    there = values > values[-1] * 1e-12 if values[-1] > 0 else np.zeros(rows, bool)
    values, vectors = values[there], vectors[:, there]
    axes: Array = (factor.T @ vectors / np.sqrt(values)).T
    return values, axes
