"""Scores and bound rules to verdicts.

What cannot be judged with certainty is never allowed by accident: it gets the decision that the
policy's `on_error` names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latentguard.judge.rules import BoundRules, Rules
from latentguard.judge.verdict import (
    ACTIONS,
    DECISIONS,
    SCHEMA_VERSION,
    SEVERITIES,
    ConceptScore,
    Verdict,
    listed,
)

# Rounding in half precision may push a cosine, and so a margin, a little past its bound.
_SLACK = 0.01


def decide(
    probability: ArrayLike,
    margin: ArrayLike,
    best_prompt: ArrayLike,
    rules: BoundRules,
    noise_level: float = 0.0,
    final: bool = True,
) -> list[Verdict]:
    """One verdict for each image of a batch.

    probability, margin: [B, K] real, a column for each concept of the policy, in its order.
    best_prompt: [B, K] integer, the index into `rules.rules.prompts` of the concept's best prompt.
    rules: bound to the model that the scores are of.
    noise_level: noise-to-signal ratio of the latents, 0 is clean, inf is pure noise.
    final: nothing follows these latents (a file, or the end of a generation): every concept is
        judged, whatever its noise window, and a match of `steer` blocks.

    Never raises and never lets pass what it cannot read: NaN, infinite or impossible scores, wrong
    shapes or a missing calibration give a verdict with `error` and the decision of the policy's
    `on_error` (block, unless it says otherwise), or a stricter one where the concepts that could be
    read call for it. Where even the number of images cannot be read there is one verdict.
    """
    count = 1
    try:
        count = max(1, *(_rows(array) for array in (probability, margin, best_prompt)))
        p, m, best = _arrays(probability, margin, best_prompt)
        _check_shapes(p, m, best, len(rules.rules.concepts))
        judge = _Batch(rules, float(noise_level), final)
        return [judge.verdict(p[i], m[i], best[i]) for i in range(len(p))]
    # Fail closed: whatever went wrong, the images have not been judged.
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return [failed(f"{kind}{error}", rules.rules, noise_level)] * count


def failed(error: str, rules: Rules | str = "block", noise_level: float = 0.0) -> Verdict:
    """The verdict on an image that could not be judged.

    rules: those whose `on_error` decides, or a decision.
    """
    decision = rules if isinstance(rules, str) else rules.on_error
    error = " ".join(error.split()) or "an error without a message"
    return Verdict(
        schema_version=SCHEMA_VERSION,
        decision=decision,
        reason=_error_reason(decision, error),
        error=error,
        noise_level=_level(noise_level),
        concepts=(),
    )


def _rows(array: ArrayLike) -> int:
    """The length of the first dimension, 1 where there is none to be read."""
    try:
        return len(array)  # type: ignore[arg-type]
    except TypeError:
        return 1


def _arrays(
    probability: ArrayLike, margin: ArrayLike, best_prompt: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    arrays = []
    for name, given in (("probability", probability), ("margin", margin)):
        array = np.asarray(given)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"scores: {name} must hold real numbers, got {array.dtype}")
        arrays.append(array.astype(np.float64))
    best = np.asarray(best_prompt)
    if best.dtype.kind not in "iu":
        raise ValueError(f"scores: best_prompt must hold integers, got {best.dtype}")
    return arrays[0], arrays[1], best.astype(np.int64)


def _check_shapes(p: NDArray[Any], m: NDArray[Any], best: NDArray[Any], concepts: int) -> None:
    for name, array in (("probability", p), ("margin", m), ("best_prompt", best)):
        if array.ndim != 2 or array.shape[1] != concepts or len(array) != len(p):
            raise ValueError(
                f"scores: {name} must be [images, {concepts} concepts] "
                f"like the others, got {list(array.shape)}"
            )


class _Batch:
    """The rules at one noise level."""

    def __init__(self, bound: BoundRules, noise_level: float, final: bool) -> None:
        if not noise_level >= 0:
            raise ValueError(f"noise_level must be at or above 0, got {noise_level}")
        self._bound, self._rules = bound, bound.rules
        self._noise_level, self._final = noise_level, final
        concepts = bound.rules.concepts
        self._ends = np.cumsum([len(rule.prompts) for rule in concepts])
        self._judged = [final or rule.judged_at(noise_level) for rule in concepts]
        self._errors: list[str] = []
        self._thresholds = [self._threshold(k) for k in range(len(concepts))]

    def _threshold(self, k: int) -> dict[str, str | float]:
        given = self._rules.concepts[k].threshold
        threshold: dict[str, str | float] = {"kind": given.kind, "value": given.value}
        if given.kind == "fpr" and self._bound.covered[k] and self._judged[k]:
            try:
                threshold["margin"] = self._bound.calibrated(k, self._noise_level)
            except ValueError as error:
                self._errors.append(str(error))
        return threshold

    def verdict(
        self, p: NDArray[np.float64], m: NDArray[np.float64], best: NDArray[np.int64]
    ) -> Verdict:
        errors = list(self._errors)
        scores: list[ConceptScore] = []
        for k in range(len(self._rules.concepts)):
            problem = self._unreadable(k, p[k], m[k], best[k])
            if problem:
                errors.append(problem)
            else:
                scores.append(self._score(k, float(p[k]), float(m[k]), int(best[k])))
        matched = self._by_weight(score for score in scores if score.matched)
        decision = self._decision(matched[0]) if matched else "allow"
        error = "; ".join(errors) or None
        on_error = self._rules.on_error
        enough = decision != "allow" and DECISIONS.index(decision) >= DECISIONS.index(on_error)
        if error is not None and not enough:
            decision = on_error
            reason = _error_reason(decision, error)
        else:
            reason = self._reason(decision, matched, scores)
        return Verdict(
            schema_version=SCHEMA_VERSION,
            decision=decision,
            reason=reason,
            error=error,
            noise_level=self._noise_level,
            concepts=tuple(scores),
            model=self._bound.model,
        )

    def _by_weight(self, matched: Iterable[ConceptScore]) -> list[ConceptScore]:
        """The gravest first."""

        def weight(score: ConceptScore) -> tuple[int, int, float]:
            severity = SEVERITIES.index(self._rules[score.id].severity)
            return DECISIONS.index(self._decision(score)), severity, score.probability

        return sorted(matched, key=weight, reverse=True)

    def _unreadable(self, k: int, p: float, m: float, best: int) -> str | None:
        name, reach = self._rules.concepts[k].id, self._rules.concepts[k].reach
        if not (math.isfinite(p) and math.isfinite(m)):
            return f"the score of concept '{name}' is not finite (probability {p}, margin {m})"
        if not (0 <= p <= 1 and abs(m) <= 2 + reach + _SLACK):
            return f"the score of concept '{name}' is impossible (probability {p}, margin {m})"
        begin = self._ends[k] - len(self._rules.concepts[k].prompts)
        if not begin <= best < self._ends[k]:
            return f"the best prompt of concept '{name}' has index {best}, which is not one of its"
        return None

    def _score(self, k: int, p: float, m: float, best: int) -> ConceptScore:
        rule, judged, covered = self._rules.concepts[k], self._judged[k], self._bound.covered[k]
        score = ConceptScore(
            id=rule.id,
            category=rule.category,
            action=rule.action,
            margin=m,
            probability=p,
            threshold=dict(self._thresholds[k]),
            prompt=self._rules.prompts[best],
            covered=covered,
            judged=judged,
            matched=False,
            unseen=self._bound.unseen[k],
        )
        # A gap of NaN is no match; the missing threshold is an error of this verdict.
        return replace(score, matched=True) if judged and covered and score.gap >= 0 else score

    def _decision(self, score: ConceptScore) -> str:
        decision = ACTIONS[score.action]
        return "block" if decision == "steer" and self._final else decision

    def _reason(
        self, decision: str, matched: Sequence[ConceptScore], scores: Sequence[ConceptScore]
    ) -> str:
        if decision != "allow":
            first = matched[0]
            late = first.action == "steer" and decision == "block"
            sentence = f"{decision}: {_match(first)}" + (
                ", and it is too late to steer" if late else ""
            )
            others = [score.id for score in matched[1:] if score.action != "observe"]
            return sentence + (f"; also matched: {listed(others)}" if others else "")
        parts = [self._closest(scores)]
        if matched:
            parts.append(f"observed only: {_match(matched[0])}")
            if len(matched) > 1:
                parts[-1] += f" and {listed([score.id for score in matched[1:]])}"
        hidden = self._bound.covered.count(False)
        if hidden:
            noun = "concept is" if hidden == 1 else "concepts are"
            parts.append(f"{hidden} {noun} not visible to this model")
        partly = [score for score in scores if score.covered and score.unseen]
        parts += [f"prompts not checked of '{s.id}': {listed(s.unseen)}" for s in partly[:3]]
        if len(partly) > 3:
            parts.append(f"prompts not checked of {len(partly) - 3} more concepts")
        return "allow: " + "; ".join(parts)

    def _closest(self, scores: Sequence[ConceptScore]) -> str:
        """The concept with the smallest gap to its threshold, in the threshold's own unit."""
        near = [
            score
            for score in scores
            if score.covered and score.judged and not score.matched and not math.isnan(score.gap)
        ]
        if not near:
            if any(score.matched for score in scores):
                return "nothing that calls for an action matched"
            return f"no concept is judged at noise level {self._noise_level:g}"
        score = max(near, key=lambda score: score.gap)
        return (
            f"closest is concept '{score.id}' by '{score.prompt}' with {score.unit} "
            f"{_figure(score.score)}, {_figure(-score.gap)} under its threshold of "
            f"{_figure(score.threshold_value)}"
        )


def _match(score: ConceptScore) -> str:
    rate = (
        f" for a false-positive rate of {score.threshold['value']:g}"
        if score.threshold["kind"] == "fpr"
        else ""
    )
    return (
        f"concept '{score.id}' matched '{score.prompt}' with {score.unit} {_figure(score.score)}, "
        f"threshold {_figure(score.threshold_value)}{rate}"
    )


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _error_reason(decision: str, error: str) -> str:
    return f"{decision}: this could not be judged, {error}"


def _level(noise_level: Any) -> float:
    """A noise level for the record: inf where it cannot be read."""
    try:
        level = float(noise_level)
    except Exception:
        return math.inf
    return level if level >= 0 else math.inf
