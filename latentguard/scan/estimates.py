"""What a sample of shards says about all of them: shares, each with a 95 % interval.

The share is a ratio estimator: images are weighted by the size of their shard, which is known once
the shard was read. Its variance is linearized, between shards first. Images of one shard resemble
one another, so 10,000 images from 10 shards may say about as much as 10 images. docs/scan.md
describes the limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.scan.sampling import OUTCOMES, Cluster, ClusterSample

_MISSED = 0.05
_MANY = 1000


@dataclass(frozen=True)
class Share:
    """The share of one outcome among all images.

    share: the estimate. low, high: the 95 % interval; where none (or nothing else) was seen, one
    end is a 95 % bound that holds however images are spread over shards. seen: how many of the
    images that were looked at. independent: where none was seen, the bound for images that fall
    where they like, regardless of shards; None otherwise.
    """

    outcome: str
    share: float
    low: float
    high: float
    seen: int
    independent: float | None = None

    @property
    def interval(self) -> str:
        """The interval in words."""
        if self.low == self.high:
            return "all images were looked at"
        if self.independent is None:
            return f"{percentage(self.low)} to {percentage(self.high)}"
        if self.seen:
            return f"at least {percentage(self.low)}"
        alone = percentage(self.independent)
        return f"at most {percentage(self.high)}; {alone} if it does not depend on the shard"

    def to_dict(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "share": self.share,
            "low": self.low,
            "high": self.high,
            "seen": self.seen,
            "independent": self.independent,
        }


def shares(sample: ClusterSample) -> list[Share]:
    """The share of each outcome, those that a policy cannot give left out where none was seen.

    Empty where no image was looked at.
    """
    clusters = [cluster for cluster in sample.clusters.values() if cluster.looked_at]
    if not clusters:
        return []
    empty = len(sample.clusters) - len(clusters)
    found = [_share(clusters, sample.shards - empty, outcome) for outcome in OUTCOMES]
    return [share for share in found if share.seen or share.outcome != "steer"]


def sentences(sample: ClusterSample) -> list[str]:
    """The results of a sample for the user: a line about the sample, and one for each outcome."""
    if not sample.images:
        return []
    lines = [
        f"sample: {sample.images:,} images of {len(sample.clusters):,} of {sample.shards:,} shards "
        f"(seed {sample.seed}); shares of all images, with 95 % intervals:"
    ]
    for share in shares(sample):
        lines.append(f"  {share.outcome}: {percentage(share.share)} ({share.interval})")
    return lines


def percentage(share: float) -> str:
    """A share as people read it: 100 %, 12.34 %, 0.0012 %."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if value > 99.99:
        return f"{value:.6g} %"
    return f"{value:.2f} %" if value >= 0.1 else f"{value:.2g} %"


def _share(clusters: Sequence[Cluster], shards: int, outcome: str) -> Share:
    """shards: how many there are to draw from, at least as many as were drawn."""
    size = np.array([cluster.size for cluster in clusters], np.float64)
    looked = np.array([cluster.looked_at for cluster in clusters], np.float64)
    hits = np.array([cluster.outcomes[outcome] for cluster in clusters], np.float64)
    seen, total = int(hits.sum()), int(looked.sum())
    share = float((size * hits / looked).sum() / size.sum())
    if len(clusters) == shards and (looked == size).all():
        return Share(outcome, share, share, share, seen)
    if seen in (0, total):
        bound = _bound(size, looked, shards)
        alone = 1 - _MISSED ** (1 / total)
        if seen:
            return Share(outcome, 1.0, 1 - bound, 1.0, seen, 1 - alone)
        return Share(outcome, 0.0, 0.0, bound, 0, alone)
    if len(clusters) == 1 < shards:
        return Share(outcome, share, 0.0, 1.0, seen)  # one shard says nothing about the others
    variance, freedom = _variance(size, looked, hits, shards)
    # On the scale of logits, where an interval is no wider than the shares that there are.
    middle = math.log(share / (1 - share))
    reach = student(freedom) * math.sqrt(variance) / (share * (1 - share))
    return Share(outcome, share, _sigmoid(middle - reach), _sigmoid(middle + reach), seen)


def _variance(
    size: NDArray[np.float64],
    looked: NDArray[np.float64],
    hits: NDArray[np.float64],
    shards: int,
) -> tuple[float, int]:
    """The variance of the ratio, and its degrees of freedom."""
    count, whole = len(size), float(size.sum())
    part = hits / looked
    share = float((size * part).sum() / whole)
    drawn = count / shards
    # Between shards. A large one pulls the ratio its own way, which its residual has to answer for.
    residual = size * (part - share) / np.maximum(1 - size / whole, 1e-9)
    between = 0.0
    if count < shards:
        between = (1 - drawn) * count / (count - 1) * float((residual**2).sum()) / whole**2
    # Within them; one that shows a single outcome may hide others.
    guess = (hits + 1) / (looked + 2)
    spread = size**2 * (1 - looked / size) * guess * (1 - guess) / looked
    within = drawn * float(spread.sum()) / whole**2
    # Never less than images drawn one by one would have: few shards may agree by chance.
    seen = float(looked.sum())
    floor = share * (1 - share) / seen * max(1 - seen * drawn / whole, 0.0)
    freedom = count - 1 if count < shards else max(int(seen) - count, 1)
    return max(between + within, floor), freedom


def _bound(size: NDArray[np.float64], looked: NDArray[np.float64], shards: int) -> float:
    """The largest share of which nothing would be seen with a chance of 5 %."""
    if len(size) < shards:
        # The worst is a share of shards that hold nothing else, of which none was drawn.
        return float(1 - _MISSED ** (1 / len(size)))
    # All shards were drawn: the worst is what hides where the fewest images were looked at for
    # what they stand for: maximize sum(w (1 - exp(-y))) with sum(n y) = -log(0.05).
    weight, budget = size / size.sum(), -math.log(_MISSED)
    unlooked = looked < size
    if not unlooked.any():
        return 0.0
    ratio = np.where(unlooked, weight / looked, 0.0)
    low, high = 0.0, float(ratio.max())
    for _ in range(200):
        level = (low + high) / 2
        spent = looked * np.log(np.maximum(ratio / max(level, 1e-300), 1.0))
        low, high = (level, high) if spent.sum() > budget else (low, level)
    hidden = 1 - np.minimum(high / np.maximum(ratio, 1e-300), 1.0)
    return float((weight * hidden).sum())


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with a whole number of degrees of freedom.

    By the finite series of its distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {freedom}")
    if freedom > _MANY:
        return _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * freedom)
    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 1 - _MISSED else (low, middle)
    return (low + high) / 2


_NORMAL = 1.959963984540054


def _within(t: float, freedom: int) -> float:
    """The chance that Student's t lies between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    steps = range(2, freedom - 1, 2) if odd else range(1, freedom - 2, 2)
    for k in steps:
        term *= square * k / (k + 1)
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
