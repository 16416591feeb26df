"""From what a detector found to right or wrong, by GenEval's definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latentguard.evaluate.geneval.prompts import Prompt, Wanted

SCORE = 0.3
COUNTING_SCORE = 0.9
MAX_OBJECTS = 16
SLACK = 0.1
"""Of both sizes together: how far centers have to be apart to stand in a relation."""


@dataclass(frozen=True)
class Detected:
    """One object. box: left, top, right, bottom in pixels. color: one of GenEval's, if known."""

    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


def confident(found: Sequence[Detected], tag: str) -> list[Detected]:
    """Those above the score that counts for a tag, the surest first, 16 at most."""
    least = COUNTING_SCORE if tag == "counting" else SCORE
    sure = [one for one in found if one.score > least]
    return sorted(sure, key=lambda one: -one.score)[:MAX_OBJECTS]


def check(prompt: Prompt, detections: Mapping[str, Sequence[Detected]]) -> list[str]:
    """What is wrong with an image, a sentence each; an empty list where it is right.

    detections: by class, everything that was found.

    Of a class that is wanted the surest objects count, as many as are wanted: all of them must
    have the color, and stand in the relation to all objects that it is to.
    """
    found = {name: confident(some, prompt.tag) for name, some in detections.items()}
    groups: list[list[Detected] | None] = []
    wrong: list[str] = []
    for wanted in prompt.include:
        there = found.get(wanted.name, [])[: wanted.count]
        problem = _problem(wanted, there, groups)
        groups.append(None if problem else there)
        if problem:
            wrong.append(problem)
    for unwanted in prompt.exclude:
        count = len(found.get(unwanted.name, []))
        if count >= unwanted.count:
            wrong.append(f"expected fewer than {unwanted.count} of {unwanted.name}, found {count}")
    return wrong


def relations(one: Detected, other: Detected) -> set[str]:
    """How the first object stands to the second: left of, right of, above, below, or none of it.

    The distance of the centers, less a tenth of both sizes along each axis, as a share of the
    whole distance: more than half of it along an axis is a relation.
    """
    offsets, kept = [], []
    for axis in (0, 1):
        centers = [(box[axis] + box[axis + 2]) / 2 for box in (one.box, other.box)]
        sizes = [abs(box[axis + 2] - box[axis]) for box in (one.box, other.box)]
        offset = centers[0] - centers[1]
        offsets.append(offset)
        kept.append(math.copysign(max(0.0, abs(offset) - SLACK * sum(sizes)), offset))
    distance = math.hypot(*offsets)
    if max(map(abs, kept)) < 1e-3:
        return set()
    names = (("left of", "right of"), ("above", "below"))
    found = set()
    for share, (before, after) in zip((k / distance for k in kept), names, strict=True):
        if abs(share) > 0.5:
            found.add(before if share < 0 else after)
    return found


def _problem(
    wanted: Wanted, there: Sequence[Detected], groups: Sequence[Sequence[Detected] | None]
) -> str | None:
    if len(there) < wanted.count:
        return f"expected {wanted.count} of {wanted.name}, found {len(there)}"
    if wanted.color is not None:
        colors = [one.color or "no color" for one in there]
        if colors.count(wanted.color) < wanted.count:
            return f"expected {wanted.color} {wanted.name}, found {', '.join(colors)}"
    if wanted.position is None:
        return None
    relation, target = wanted.position
    others = groups[target]
    if others is None:
        return f"nothing is there for {wanted.name} to be {relation}"
    for one in there:
        for other in others:
            if relation not in (found := relations(one, other)):
                seen = " and ".join(sorted(found)) or "neither beside nor above"
                return f"expected {wanted.name} {relation} its target, found it {seen}"
    return None
