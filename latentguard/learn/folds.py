"""Cross-validation: every example is scored by heads that saw neither it nor what looks like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.learn.heads import solutions
from latentguard.learn.statistics import Array, Sums

FOLDS = 5
FEW = 10
"""Groups of positives below which each is a fold of its own."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Scores of examples by heads that were solved without their fold.

    positives: [S, P] and negatives [S, N], a row for each of S shrinkages. folds: how many.
    """

    positives: Array
    negatives: Array
    folds: int


def assign(
    positives: NDArray[np.int64], negatives: NDArray[np.int64], seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """A fold for each example, from the numbers of the groups that they belong to.

    Groups with a positive are dealt first, so that folds have about as many of them; then the
    others. Returns the folds of positives [P] and of negatives [N], and how many folds there are.
    """
    rng = np.random.default_rng(seed)
    first = rng.permutation(np.unique(positives))
    rest = rng.permutation(np.setdiff1d(negatives, positives))
    count = FOLDS if len(first) >= FEW else len(first)
    fold = {int(group): place % count for place, group in enumerate(first)}
    fold |= {int(group): place % count for place, group in enumerate(rest)}
    of = np.vectorize(fold.__getitem__, otypes=[np.int64])
    return of(positives), of(negatives), count


def held_out(
    positives: Array,
    negatives: Array,
    folds: tuple[NDArray[np.int64], NDArray[np.int64], int],
    shrinkages: Sequence[float],
) -> HeldOut:
    """Scores of vectors [P, F] and [N, F], each by the heads of the other folds.

    Raises ValueError where a fold leaves nothing of a side, or two equal means.
    """
    of_positives, of_negatives, count = folds
    scores = [np.zeros((len(shrinkages), len(side))) for side in (positives, negatives)]
    for fold in range(count):
        kept = of_positives != fold, of_negatives != fold
        if not (kept[0].any() and kept[1].any()):
            raise ValueError("a fold leaves no examples of one side")
        sums = Sums.of(positives[kept[0]]), Sums.of(negatives[kept[1]])
        for row, head in enumerate(solutions(*sums, shrinkages)):
            scores[0][row, ~kept[0]] = head(positives[~kept[0]])
            scores[1][row, ~kept[1]] = head(negatives[~kept[1]])
    return HeldOut(scores[0], scores[1], count)
