"""Files of one concept to one: what was learned for other models side by side, what was learned for
the same model added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentsError, PolicyError
from latentguard.learn.platt import Scale
from latentguard.learn.shipped import find_background
from latentguard.learn.solved import Solved
from latentguard.learn.statistics import Sums
from latentguard.policy.examples import ConceptFile, Learned


def merge(files: Sequence[ConceptFile]) -> list[Learned]:
    """The entries of all files; those of one model and space become one.

    A head is solved again from the sums of all its examples, so its direction is that of learning
    from all of them at once with the same shrinkage. Its shrinkage and its scale are those of the
    parts, weighed by their positives. Cross-validation cannot be done again without the examples:
    the parts' figures are kept as what they are.

    Raises:
        PolicyError: a part without sums, or with sums that are not whole.
        LatentsError: two parts of the same examples.
        ModelError: the background of a part is not that of the package any more.
    """
    by_key: dict[tuple[str, str, str], list[tuple[ConceptFile, Learned]]] = {}
    for file in files:
        for entry in file.entries:
            by_key.setdefault(entry.key, []).append((file, entry))
    return [_merged(parts) if len(parts) > 1 else parts[0][1] for parts in by_key.values()]


def _merged(parts: Sequence[tuple[ConceptFile, Learned]]) -> Learned:
    first = parts[0][1]
    solved = [_solved(file, entry) for file, entry in parts]
    _check_different(parts, solved)
    weights = np.array([one.positives.count for one in solved], np.float64)
    weights /= weights.sum()
    slope = float(weights @ [one.scale.slope for one in solved])
    offset = float(weights @ [one.scale.offset for one in solved])
    shrinkage = float(np.exp(weights @ np.log([one.shrinkage for one in solved])))
    fresh = _fresh(solved)
    own = [one.own for one, new in zip(solved, fresh, strict=True) if one.own is not None and new]
    background = next((one.background for one in solved if one.background is not None), None)
    together = Solved(
        reduce(Sums.__add__, [one.positives for one in solved]),
        reduce(Sums.__add__, own) if own else None,
        background,
        shrinkage,
        Scale(slope, offset),
        solved[0].logit_scale,
    )
    weight, bias = together.head()
    said = [one for _, entry in parts for one in entry.figures.get("merged_from", [entry.figures])]
    return replace(
        first,
        weight=weight.astype(np.float32),
        bias=float(np.float32(bias)),
        joint=_joint([entry for _, entry in parts], solved, fresh),
        positives=together.positives.count,
        negatives=together.negatives.count,
        background=background is not None,
        figures={"head": first.figures.get("head"), "shrinkage": shrinkage, "merged_from": said},
        statistics=together.to_arrays(),
    )


def _solved(file: ConceptFile, entry: Learned) -> Solved:
    where = f"{file.path or file.name}: what was learned for {entry.model} on {entry.space} latents"
    if not entry.statistics:
        raise PolicyError(
            f"{where} has no sums (it was learned with --no-sums), so nothing can be added to it"
        )
    background = None
    if entry.background:
        background = Sums.of(find_background(*entry.key).rows)
    try:
        return Solved.from_arrays(entry.statistics, background, len(entry.weight))
    except (KeyError, ValueError) as error:
        raise PolicyError(f"{where} has damaged sums: {error}") from error


def _check_different(
    parts: Sequence[tuple[ConceptFile, Learned]], solved: Sequence[Solved]
) -> None:
    numbered = [(file, one.positives) for (file, _), one in zip(parts, solved, strict=True)]
    for (file, one), (other_file, other) in combinations(numbered, 2):
        if _same(one, other):
            raise LatentsError(
                f"{file.path} and {other_file.path} were learned from the same positives: give one "
                "of them"
            )


def _same(one: Sums, other: Sums) -> bool:
    """Whether two sums are of the same examples."""
    return one.count == other.count and np.allclose(one.mean, other.mean, rtol=0, atol=1e-7)


def _fresh(solved: Sequence[Solved]) -> list[bool]:
    """Of each part, whether its own negatives are none that a part before it has, as a whole."""
    known: list[Sums] = []
    found = []
    for one in solved:
        new = one.own is not None and not any(_same(one.own, other) for other in known)
        if new and one.own is not None:
            known.append(one.own)
        found.append(new)
    return found


def _joint(
    entries: Sequence[Learned], solved: Sequence[Solved], fresh: Sequence[bool]
) -> NDArray[np.float32]:
    """The mean embedding of all negatives, each set once."""
    total, number = np.zeros(len(entries[0].joint)), 0
    of_background: tuple[int, NDArray[np.float64]] | None = None
    for entry, one, new in zip(entries, solved, fresh, strict=True):
        mine = entry.negatives * entry.joint.astype(np.float64)
        if one.background is not None:
            shared = find_background(*entry.key).joint.astype(np.float64)
            of_background = one.background.count, one.background.count * shared
            mine = mine - of_background[1]
        if new and one.own is not None:
            total, number = total + mine, number + one.own.count
    if of_background is not None:
        number, total = number + of_background[0], total + of_background[1]
    return (total / number).astype(np.float32)
