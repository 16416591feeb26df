"""From images that are right or wrong to GenEval's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentguard.evaluate.generate.shares import RESAMPLES, interval_dict, share
from latentguard.evaluate.geneval.prompts import TAGS, Prompt
from latentguard.evaluate.metrics import Interval


@dataclass(frozen=True)
class Seen:
    """One image of an arm. correct: None where nothing evaluated it."""

    row: int
    blocked: bool
    correct: bool | None


def measure_arm(
    prompts: Sequence[Prompt], images: Sequence[Seen], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The figures of one arm, JSON-able.

    `overall` is the mean over the tags of the share of right images, as GenEval defines it. A
    blocked image is not right. by_tag, overall and prompts are None where nothing was evaluated.
    """
    groups = [image.row for image in images]
    blocked = share([image.blocked for image in images], groups, seed, resamples)
    found: dict[str, Any] = {"images": len(images), "blocked": interval_dict(blocked)}
    if any(image.correct is None for image in images):
        return found | {"overall": None, "by_tag": {}, "prompts": None}
    right = [bool(image.correct) and not image.blocked for image in images]
    by_tag = {}
    for tag in TAGS:
        where = [i for i, image in enumerate(images) if prompts[image.row].tag == tag]
        if where:
            part = share([right[i] for i in where], [groups[i] for i in where], seed, resamples)
            by_tag[tag] = {**interval_dict(part), "images": len(where)}
    rows = sorted(set(groups))
    any_right = dict.fromkeys(rows, False)
    for row, hit in zip(groups, right, strict=True):
        any_right[row] |= hit
    return found | {
        "overall": interval_dict(_overall(prompts, groups, right, resamples, seed)),
        "by_tag": by_tag,
        "prompts": interval_dict(share(list(any_right.values()), rows, seed, resamples)),
    }


def _overall(
    prompts: Sequence[Prompt],
    groups: Sequence[int],
    right: Sequence[bool],
    resamples: int,
    seed: int,
) -> Interval:
    """The mean over tags; the bootstrap draws prompts within each tag."""
    rng = np.random.default_rng(seed)
    values, drawn = [], []
    for tag in TAGS:
        rows = sorted({row for row in groups if prompts[row].tag == tag})
        if not rows:
            continue
        place = {row: index for index, row in enumerate(rows)}
        sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
        for row, hit in zip(groups, right, strict=True):
            if row in place:
                sums[place[row]] += hit
                counts[place[row]] += 1
        weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples)
        values.append(sums.sum() / counts.sum())
        drawn.append((weights @ sums) / (weights @ counts))
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high))
