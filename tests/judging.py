"""Policies and scores straight to verdicts, for tests that have both as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from latentguard.judge import ModelId, Rules, Verdict, decide

Model = tuple[str, str]


def decided(
    probability: ArrayLike,
    margin: ArrayLike,
    best_prompt: ArrayLike,
    policy: Mapping[str, Any],
    *,
    covered: Sequence[bool] | None = None,
    seen: Sequence[bool] | None = None,
    noise_level: float = 0.0,
    final: bool = True,
    model: Model | None = None,
    space: str | None = None,
) -> list[Verdict]:
    """Verdicts by `Policy.to_dict()`, bound to a model of that name and digest."""
    identity = None if model is None else ModelId(*model)
    rules = Rules.of(policy).bind(identity, space, covered=covered, seen=seen)
    return decide(probability, margin, best_prompt, rules, noise_level, final)


def limit_of(
    concept: Mapping[str, Any],
    policy: Mapping[str, Any],
    model: Model | None = None,
    space: str | None = None,
    noise_level: float = 0.0,
    *,
    logit_scale: float | None = None,
) -> float:
    """The margin from which on a concept matches."""
    identity = None if model is None else ModelId(*model)
    rules = Rules.of({**policy, "concepts": [concept]}).bind(identity, space, logit_scale)
    return rules.threshold(0, noise_level)
