"""How well scores separate positives from negatives: AUROC, average precision, FPR at a recall.

Written in NumPy from the counts of true and false positives at every threshold, so that the
bootstrap is the same code with one more axis. Definitions as in scikit-learn, which the tests
compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latentguard.deprecated import former_names

RECALL = 0.95
"""The recall at which the false-positive rate is read."""

BATCH = 8 << 20
"""Numbers of one bootstrap array (64 MiB); more resamples go in further batches."""

_Z = 1.959964

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Positives and negatives at or above each threshold, from the highest threshold down.

    thresholds: [T] distinct scores, descending.
    true_positives, false_positives: [..., T], leading axes are resamples.
    """

    thresholds: Array
    true_positives: Array
    false_positives: Array

    @property
    def recall(self) -> Array:
        """True-positive rate [..., T]."""
        return self.true_positives / self.true_positives[..., -1:]

    @property
    def fpr(self) -> Array:
        """False-positive rate [..., T]."""
        return self.false_positives / self.false_positives[..., -1:]

    @property
    def precision(self) -> Array:
        """Precision [..., T]; 1 where nothing is at or above the threshold."""
        total = self.true_positives + self.false_positives
        ones: Array = np.ones_like(self.true_positives)
        return np.divide(self.true_positives, total, out=ones, where=total > 0)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


if not TYPE_CHECKING:
    __getattr__ = former_names(__name__, {"Estimate": "Interval"})


@dataclass(frozen=True)
class Separation:
    """What `separation` measured; counts are those of the sample itself."""

    auroc: Interval
    average_precision: Interval
    fpr_at_recall: Interval
    positives: int
    negatives: int
    counts: Counts


def count(positives: ArrayLike, negatives: ArrayLike) -> Counts:
    """Counts at every threshold, from the scores of positives [P] and negatives [N].

    Raises ValueError for an empty side, another rank, or scores that are not finite.
    """
    return _count(_checked("positives", positives), _checked("negatives", negatives), None)


def auroc(counts: Counts) -> Array:
    """Area under the ROC curve [...]: the chance that a positive scores above a negative.

    Equal scores count half.
    """
    zero = np.zeros_like(counts.recall[..., :1])
    x = np.concatenate([zero, counts.fpr], axis=-1)
    y = np.concatenate([zero, counts.recall], axis=-1)
    area: Array = (np.diff(x, axis=-1) * (y[..., 1:] + y[..., :-1])).sum(-1) / 2
    return area


def average_precision(counts: Counts) -> Array:
    """Mean precision over the recalls that are reached [...] (a step function, not trapezoids)."""
    zero = np.zeros_like(counts.recall[..., :1])
    steps = np.diff(np.concatenate([zero, counts.recall], axis=-1), axis=-1)
    mean: Array = (steps * counts.precision).sum(-1)
    return mean


def fpr_at_recall(counts: Counts, recall: float = RECALL) -> Array:
    """The false-positive rate [...] of the highest threshold that finds `recall` of positives."""
    # Counts are whole numbers: half of one keeps 0.95 * 20 == 19 from failing by rounding.
    wanted = np.ceil(recall * counts.true_positives[..., -1:] - 1e-9)
    first = (counts.true_positives >= wanted).argmax(axis=-1)
    found: Array = np.take_along_axis(counts.fpr, first[..., None], axis=-1)[..., 0]
    return found


def separation(
    positives: ArrayLike, negatives: ArrayLike, resamples: int = 1000, seed: int = 0
) -> Separation:
    """AUROC, average precision and FPR at 95 % recall with 95 % bootstrap intervals.

    Scores that are fully separated have no spread for a bootstrap to find. Then AUROC has
    Newcombe's interval and the false-positive rate has Wilson's; the interval of average precision
    stays a point, because no such interval of it is in use.

    Args:
        positives, negatives: scores [P] and [N], higher means more like the concept.
        resamples: draws with replacement, of positives and negatives apart (their numbers stay).
        seed: of the draws.

    Raises:
        ValueError: an empty side, or scores that are not finite.
    """
    counts = count(positives, negatives)
    sides = [np.asarray(positives, np.float64), np.asarray(negatives, np.float64)]
    rng = np.random.default_rng(seed)
    values: list[list[Array]] = [[], [], []]
    batch = max(1, min(resamples, BATCH // sum(map(len, sides))))
    for start in range(0, resamples, batch):
        number = min(batch, resamples - start)
        drawn = [rng.multinomial(len(s), np.full(len(s), 1 / len(s)), number) for s in sides]
        resampled = _count(sides[0], sides[1], (drawn[0], drawn[1]))
        for kept, metric in zip(values, (auroc, average_precision, fpr_at_recall), strict=True):
            kept.append(metric(resampled))
    estimates = []
    for kept, metric in zip(values, (auroc, average_precision, fpr_at_recall), strict=True):
        value = float(metric(counts))
        low, high = (
            np.percentile(np.concatenate(kept), [2.5, 97.5]) if resamples else (value, value)
        )
        estimates.append(Interval(value, float(low), float(high)))
    area, precision, fpr = estimates
    if resamples and _at_an_end(area):
        area = auroc_interval(float(round(area.value)), len(sides[0]), len(sides[1]))
    if resamples and _at_an_end(fpr):
        fpr = wilson(round(fpr.value) * len(sides[1]), len(sides[1]))
    return Separation(area, precision, fpr, len(sides[0]), len(sides[1]), counts)


def _at_an_end(interval: Interval) -> bool:
    """Whether it is nothing but 0 or 1, up to rounding."""
    ends = np.array([interval.low, interval.value, interval.high])
    return bool(np.allclose(ends, round(interval.value), rtol=0, atol=1e-9))


def auroc_interval(area: float, positives: int, negatives: int) -> Interval:
    """The 95 % interval of an AUROC by Newcombe's method 5 (2006), which is no point at 1.

    A bootstrap of few examples that are all on their side says [1, 1], and promises too much.
    """
    even = (positives + negatives) / 2 - 1

    def beyond(true: float) -> float:
        """How many deviations of a true area the one found is away, squared, less the limit's."""
        spread = 1 + even * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * spread / (positives * negatives)
        return (area - true) ** 2 - _Z**2 * variance

    return Interval(area, _root(beyond, 0.0, area), _root(beyond, 1.0, area))


def _root(beyond: Callable[[float], float], outside: float, inside: float) -> float:
    """Where it changes sign between a point outside of the interval and one inside of it."""
    if beyond(outside) <= 0:
        return outside
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if beyond(middle) > 0 else (outside, middle)
    return inside


def wilson(hits: int, n: int) -> Interval:
    """A proportion with its 95 % Wilson interval (Wilson 1927)."""
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"wilson: hits must be 0 to n and n positive, got {hits} of {n}")
    z = _Z
    p = hits / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, float(center - half)), min(1.0, float(center + half)))


def ranks_of(similarities: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """The right class's place [N] in rows [N, C], 0 is first; of equals the lower index wins."""
    scores = np.asarray(similarities)
    right = np.asarray(labels)
    own = scores[np.arange(len(scores)), right][:, None]
    before = np.arange(scores.shape[1])[None] < right[:, None]
    ranks: NDArray[np.int64] = ((scores > own) | ((scores == own) & before)).sum(1)
    return ranks


def _checked(name: str, scores: ArrayLike) -> Array:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must be scores [n], n at least 1, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name} must be finite, got {int((~np.isfinite(values)).sum())} that are not"
        )
    return values


def _count(
    positives: Array, negatives: Array, weights: tuple[ArrayLike, ArrayLike] | None
) -> Counts:
    scores = np.concatenate([positives, negatives])
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # of each run of ties
    totals = []
    for side in (0, 1):
        w = np.ones(len((positives, negatives)[side])) if weights is None else weights[side]
        own = np.asarray(w, np.float64)
        other = np.zeros((*own.shape[:-1], len((negatives, positives)[side])))
        both = [own, other] if side == 0 else [other, own]
        totals.append(np.concatenate(both, axis=-1)[..., order].cumsum(-1)[..., last])
    return Counts(ordered[last], totals[0], totals[1])
