"""Examples that show nearly the same: they count as one, and are never in two folds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from latentguard.policy.examples import Kind

NEAR: dict[Kind, float] = {"trunk": 0.95, "joint": 0.98}
"""Cosine of two feature vectors from which they count as nearly the same. Of different photos of
one class the trunk's are below 0.95; a photo and its middle 94 % have about 0.95, and a photo with
noise 0.999 (docs/concepts.md)."""
SAME = 0.995
"""From here on two pictures are one, and cannot be an example of both sides."""
BATCH = 1024

Rows = NDArray[np.float32]


def groups(rows: Rows, near: float) -> NDArray[np.int64]:
    """A group's number [n] for unit vectors [n, F]: its first member's index.

    What is near to a member belongs to the group, however far it is from the others.
    """
    parent = np.arange(len(rows))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = int(parent[index])
        return index

    for begin in range(0, len(rows), BATCH):
        close = rows[begin : begin + BATCH] @ rows[begin:].T >= near
        for one, other in np.argwhere(close):
            first, second = root(begin + int(one)), root(begin + int(other))
            parent[max(first, second)] = min(first, second)
    return np.array([root(index) for index in range(len(rows))], np.int64)


def shared(positives: Rows, negatives: Rows) -> list[tuple[int, int]]:
    """Pairs of a positive and a negative that are the same picture, a positive's first one each."""
    found: dict[int, int] = {}
    for begin in range(0, len(negatives), BATCH):
        close = positives @ negatives[begin : begin + BATCH].T >= SAME
        for one, other in np.argwhere(close):
            found.setdefault(int(one), begin + int(other))
    return sorted(found.items())
