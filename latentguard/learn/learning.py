"""Examples to a learned head, with what held-out examples say of it; or one sentence on why not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.encoders import Encoder, traits
from latentguard.encoders.examples import whole
from latentguard.errors import LatentsError
from latentguard.evaluate.metrics import auroc, count
from latentguard.learn.duplicates import NEAR, Rows, groups, shared
from latentguard.learn.examples import Examples
from latentguard.learn.figures import Figures, figures
from latentguard.learn.folds import FEW, assign, held_out
from latentguard.learn.platt import fit
from latentguard.learn.shipped import Background, find_background
from latentguard.learn.solved import Solved
from latentguard.learn.statistics import Array, Sums
from latentguard.policy.examples import Kind, Learned

SHRINKAGES = (0.1, 0.3, 0.6)
"""What cross-validation chooses from; the nearest to the middle of those that separate alike."""
OF_FEW = 0.6
"""The shrinkage where there are fewer than `FEW` different positives, too few to choose by."""
FEWEST_NEGATIVES = 20
NAMED = 3
"""Names that a sentence gives before it says how many more there are."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What was learned for one model.

    learned: the entry for a concept's file. figures: of cross-validation.
    warnings: sentences on what cannot be promised.
    """

    learned: Learned
    figures: Figures
    warnings: tuple[str, ...]


def learn(
    positives: Examples,
    negatives: Examples | None,
    encoder: Encoder,
    *,
    seed: int = 0,
    sums: bool = True,
) -> Lesson:
    """Learn to tell positives from negatives as one model sees them.

    Args:
        positives, negatives: without negatives the package's background stands in for them.
        encoder: the one that gave the examples.
        seed: of the folds; the same examples give the same entry to the bit.
        sums: whether the entry keeps the sums that `merge` needs.

    Raises:
        LatentsError: examples that nothing can be learned from: one positive, all nearly the same,
            one picture on both sides, too few negatives, sides that cannot be told apart.
        ModelError: no negatives, and the package has none for this model.
    """
    model = whole(encoder)
    kind: Kind = "trunk" if traits(model).trunk_dim else "joint"
    background = (
        None if negatives is not None else find_background(model.name, model.sha256, model.space)
    )
    against = background or negatives
    assert against is not None
    of_positives, of_negatives = _groups(positives, negatives, against.rows, kind)
    folds = assign(of_positives, of_negatives, seed)
    choices = SHRINKAGES if len(np.unique(of_positives)) >= FEW else (OF_FEW,)
    high, low = positives.rows.astype(np.float64), against.rows.astype(np.float64)
    found = held_out(high, low, folds, choices)
    # Of examples that show nearly the same, one tells as much as all.
    firsts = _first(of_positives), _first(of_negatives)
    sides = found.positives[:, firsts[0]], found.negatives[:, firsts[1]]
    best = _best(*sides)
    scale = fit(sides[0][best], sides[1][best])
    margins = [(side[best] * scale.slope + scale.offset) / model.logit_scale for side in sides]
    told = figures(margins[0], margins[1], model.logit_scale)
    _check_separable(told)
    alike = scale.slope * found.negatives[best] + scale.offset
    warnings = _warnings(told, background, alike)
    if background is not None and positives.sizes - {background.size}:
        warnings += (_other_size(positives, background),)
    given = Sums.of(low)
    solved = Solved(
        Sums.of(high),
        None if background else given,
        given if background else None,
        choices[best],
        scale,
        model.logit_scale,
    )
    weight, bias = solved.head()
    learned = Learned(
        model=model.name,
        model_sha256=model.sha256,
        space=model.space,
        features=kind,
        weight=weight.astype(np.float32),
        bias=float(np.float32(bias)),
        joint=against.joint,
        positives=len(high),
        negatives=len(low),
        background=background is not None,
        figures={
            "head": "shrunk discriminant",
            "shrinkage": choices[best],
            "folds": found.folds,
            "validated": told.to_dict(),
            "negatives_from": background.about if background else "the examples given",
            "warnings": list(warnings),
        },
        statistics=solved.to_arrays() if sums else {},
    )
    return Lesson(learned, told, warnings)


def _groups(
    positives: Examples, negatives: Examples | None, against: Rows, kind: Kind
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups of what shows nearly the same, of both sides. Raises LatentsError as `learn` does."""
    if len(positives) == 1:
        raise LatentsError(
            f"one positive is too few to learn from ({positives.names[0]}): nothing would be left "
            "to check with what was learned; give at least 2 different ones, better 20"
        )
    if len(against) < FEWEST_NEGATIVES:
        raise LatentsError(
            f"{len(against)} negatives are too few to learn from: give at least "
            f"{FEWEST_NEGATIVES}, better 500, or none where the package has its own"
        )
    if negatives is not None:
        _check_apart(positives, negatives)
    of = groups(np.concatenate([positives.rows, against]), NEAR[kind])
    first, rest = of[: len(positives)], of[len(positives) :]
    if len(np.unique(first)) == 1:
        raise LatentsError(
            f"the {len(positives)} positives show nearly the same picture (such as "
            f"{positives.names[0]} and {positives.names[1]}), which count as one: give at least 2 "
            "different ones, better 20"
        )
    return first, rest


def _check_apart(positives: Examples, negatives: Examples) -> None:
    both = shared(positives.rows, negatives.rows)
    if both:
        names = [f"{positives.names[p]} = {negatives.names[n]}" for p, n in both[:NAMED]]
        more = f" and {len(both) - NAMED} more" if len(both) > NAMED else ""
        raise LatentsError(
            f"{len(both)} of the positives are among the negatives, too: {'; '.join(names)}{more}; "
            "take them out of one side"
        )


def _first(of: NDArray[np.int64]) -> NDArray[np.intp]:
    """The index of one example of each group."""
    return np.sort(np.unique(of, return_index=True)[1])


def _best(positives: Array, negatives: Array) -> int:
    """The row of scores [S, P] and [S, N] that separates best."""
    areas = [
        round(float(auroc(count(*sides))), 3) for sides in zip(positives, negatives, strict=True)
    ]
    middle = (len(areas) - 1) / 2
    return max(range(len(areas)), key=lambda row: (areas[row], -abs(row - middle)))


def _check_separable(told: Figures) -> None:
    if told.auroc.low <= 0.5:
        raise LatentsError(
            f"the positives cannot be told from the negatives: AUROC {told.auroc} over examples "
            "that were held out, and 0.5 is chance; give more examples, or clearer ones, or "
            "another --model"
        )


def _other_size(positives: Examples, background: Background) -> str:
    sizes = " and ".join(f"{h} x {w}" for h, w in sorted(positives.sizes))
    usual = "{} x {}".format(*background.size)
    return (
        f"the package's photos were read at {usual} latent cells and the positives at {sizes}, so "
        "the size may be part of what was learned: give negatives of the same size"
    )


def _warnings(told: Figures, background: Background | None, odds: Array) -> tuple[str, ...]:
    found = []
    if told.positives < FEW:
        found.append(
            f"{told.positives} different positives are too few for a promise: read the intervals, "
            "and test with others (latentguard concept test)"
        )
    elif not told.at_rates:
        rate, number = told.needed[0]
        found.append(
            f"{told.negatives} different negatives say nothing of a false-positive rate of "
            f"{rate:g}: that needs {number}"
        )
    if background is not None:
        order = np.argsort(-odds, kind="stable")
        alike = [background.names[i] for i in order if odds[i] >= 0]
        if alike:
            found.append(
                f"{len(alike)} of the {len(odds)} background photos score like the concept "
                f"({', '.join(alike[:NAMED])}): if they show it, give negatives of your own"
            )
    return tuple(found)
