"""Scores to log odds: Platt scaling of scores that were held out (Platt 1999).

Both sides count the same, whatever their numbers, so that a probability of 0.5 is where an image
is as likely to be one of the positives as one of the negatives. The targets are Platt's smoothed
ones, which keep the slope finite where the sides do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

STEPS = 100
RIDGE = 1e-9
"""Keeps Newton's steps finite; far below what a single score weighs."""


@dataclass(frozen=True)
class Scale:
    """Log odds are slope * score + offset. The slope is never negative."""

    slope: float
    offset: float


def fit(positives: ArrayLike, negatives: ArrayLike) -> Scale:
    """The scale of scores [P] and [N], both at least one and finite.

    Scores that rank the negatives higher have slope 0: they tell nothing.
    """
    sides = [np.asarray(positives, np.float64), np.asarray(negatives, np.float64)]
    scores = np.concatenate(sides)
    high, low = (len(sides[0]) + 1) / (len(sides[0]) + 2), 1 / (len(sides[1]) + 2)
    targets = np.concatenate([np.full(len(sides[0]), high), np.full(len(sides[1]), low)])
    weights = np.concatenate([np.full(len(side), 0.5 / len(side)) for side in sides])
    middle, spread = scores.mean(), scores.std() or 1.0
    design = np.stack([(scores - middle) / spread, np.ones(len(scores))], 1)
    found = np.zeros(2)
    loss = _loss(design @ found, targets, weights)
    for _ in range(STEPS):
        odds = design @ found
        chance = 1 / (1 + np.exp(-odds))
        slope = design.T @ (weights * (chance - targets))
        curve = (design * (weights * chance * (1 - chance))[:, None]).T @ design
        step = np.linalg.solve(curve + RIDGE * np.eye(2), slope)
        share = 1.0
        while _loss(design @ (found - share * step), targets, weights) > loss and share > 1e-6:
            share /= 2
        found = found - share * step
        before, loss = loss, _loss(design @ found, targets, weights)
        if before - loss < 1e-12:
            break
    factor = float(found[0] / spread)
    if factor <= 0:
        return Scale(0.0, 0.0)
    return Scale(factor, float(found[1] - factor * middle))


def _loss(odds: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    return float((weights * (np.logaddexp(0, odds) - targets * odds)).sum())
