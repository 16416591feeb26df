"""From the records of searches to figures: similarities before and after, curves, seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentguard.evaluate.generate.shares import RESAMPLES, batches, interval_dict, mean, means
from latentguard.evaluate.metrics import Interval

Record = Mapping[str, Any]
"""What a run's folder keeps of one image of an arm `reno`."""


def measure_arm(
    records: Sequence[Record], reward: str, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The figures of one arm, JSON-able; nothing in them is a time.

    Similarities are cosines of image and prompt by an encoder. `measured` has, by encoder, the mean
    of the first images, of the best ones, and of what each gained. `curve` is, for each iteration,
    the mean of the best similarity so far by the reward's own, and `iterates` that of the iterates.
    Intervals are bootstraps over prompts.
    """
    groups = [int(record["row"]) for record in records]
    facts = [record["facts"] for record in records]
    iterates = np.array([fact["similarity"] for fact in facts], np.float64)
    measured = {}
    for name in facts[0]["measured"]:
        before, after = np.array([fact["measured"][name] for fact in facts], np.float64).T
        measured[name] = {
            "before": interval_dict(mean(before, groups, seed, resamples)),
            "after": interval_dict(mean(after, groups, seed, resamples)),
            "gained": interval_dict(mean(after - before, groups, seed, resamples)),
        }
    best = np.fmax.accumulate(iterates, axis=1)
    return {
        "images": len(records),
        "reward": reward,
        "iterations": iterates.shape[1] - 1,
        "measured": measured,
        "curve": [interval_dict(one) for one in means(best, groups, seed, resamples)],
        "iterates": [interval_dict(one) for one in means(iterates, groups, seed, resamples)],
    }


def seconds_of(record: Record) -> float:
    """Of one image: the search, and the picture of what it found."""
    return float(sum(record["facts"]["seconds"].values()))


def cost_of(records: Sequence[Record]) -> dict[str, Any]:
    """Seconds of an arm's images, and the most memory that a GPU held during one of them."""
    searches = [float(record["facts"]["seconds"]["search"]) for record in records]
    lengths = [max(1, len(record["facts"]["similarity"]) - 1) for record in records]
    each = [spent / length for spent, length in zip(searches, lengths, strict=True)]
    peaks = [record["facts"]["peak_bytes"] for record in records]
    return {
        "search_seconds_median": round(statistics.median(searches), 4),
        "iteration_seconds_median": round(statistics.median(each), 5),
        "peak_bytes": None if None in peaks else max(peaks),
    }


def saved(
    of: Sequence[Record], against: Sequence[Record], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The share of seconds that an arm saves against another: the median over prompts.

    Images are paired by their noise and prompt; the interval is a bootstrap over prompts. A median
    leaves out what the first image waits for, and what a busy machine adds to some.
    """
    shares: dict[int, list[float]] = {}
    for one, other in zip(of, against, strict=True):
        share = 1 - seconds_of(one) / seconds_of(other)
        shares.setdefault(int(one["row"]), []).append(share)
    prompts = np.array([statistics.fmean(some) for some in shares.values()])
    rng = np.random.default_rng(seed)
    drawn = [
        np.median(rng.choice(prompts, (number, len(prompts))), axis=1)
        for number in batches(resamples, len(prompts))
    ]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return interval_dict(Interval(float(np.median(prompts)), float(low), float(high)))
