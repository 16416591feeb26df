"""Cascades: a cheap model judges first, and a better one only where the first is not sure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from latentguard.errors import ModelError
from latentguard.judge.protocol import Heatmaps, Judge, Judged
from latentguard.judge.rules import BoundRules
from latentguard.judge.verdict import Verdict

_MARK = "the first model of the cascade)"

Batch = TypeVar("Batch")


class CascadeJudge(Generic[Batch]):
    """Two judges of one policy, itself a judge.

    The first is sure of an image where every concept's margin is further from its threshold than
    `unsure`, and nothing went wrong; its verdict stands then.

    Args:
        first, second: the judges, of one policy.
        unsure: the policy's, a distance in margins.
        pick: some images of a batch, by their indices.

    Raises ModelError where the first judge reads another space, or cannot see all prompts, as it
    would then allow what only the second can see; also where it has no calibrated threshold for a
    concept that asks for a false-positive rate, as it would then be sure of nothing.
    """

    def __init__(
        self,
        first: Judge[Batch],
        second: Judge[Batch],
        unsure: float,
        pick: Callable[[Batch, list[int]], Batch],
    ) -> None:
        self.first, self.second = first, second
        self._unsure, self._pick = unsure, pick
        _check_first(first.bound, second.bound)

    @property
    def bound(self) -> BoundRules:
        """The second judge's, whose verdicts are the better ones."""
        return self.second.bound

    def judge(
        self,
        latents: Batch,
        noise_level: float = 0.0,
        final: bool = True,
        heatmaps: bool = False,
    ) -> Judged:
        """As `Judge.judge`; heat maps are the second model's, of every image."""
        by_first = self.first.judge(latents, noise_level, final)
        unsure = [i for i, verdict in enumerate(by_first.verdicts) if not self.is_sure(verdict)]
        verdicts = [self._named(verdict) for verdict in by_first.verdicts]
        maps: Heatmaps | None = None
        better: Sequence[Verdict] | None = None
        if heatmaps:
            try:
                every = self.second.judge(latents, noise_level, final, heatmaps=True)
                maps, better = every.heatmaps, [every.verdicts[i] for i in unsure]
            # The second model reads the others for its maps alone.
            except Exception as error:
                maps = Heatmaps.failed(error)
        if unsure and better is None:
            better = self.second.judge(self._pick(latents, unsure), noise_level, final).verdicts
        for i, verdict in zip(unsure, better or (), strict=True):
            verdicts[i] = verdict
        asked = set(unsure)
        return Judged(verdicts, maps, tuple(i in asked for i in range(len(verdicts))))

    def _named(self, verdict: Verdict) -> Verdict:
        model = self.first.bound.model
        return replace(verdict, reason=f"{verdict.reason} (by {model and model.name}, {_MARK}")

    def is_sure(self, verdict: Verdict) -> bool:
        """Whether a verdict of the first judge stands."""
        bound = self.first.bound
        if verdict.error is not None:
            return False
        for score in verdict.concepts:
            if not score.judged:
                continue
            threshold = bound.threshold(bound.rules.ids.index(score.id), verdict.noise_level)
            # Not "<=": a NaN is never sure.
            if not abs(score.margin - threshold) > self._unsure:
                return False
        return True


def _check_first(first: BoundRules, second: BoundRules) -> None:
    rules, model = first.rules, first.model
    assert model is not None
    what = f"policy '{rules.policy.name}': cascade.first {model.name}"
    if first.space != second.space:
        raise ModelError(f"{what} reads {first.space} latents, the second model {second.space}")
    hidden = [
        f"{name} ({', '.join(map(repr, unseen))})"
        for name, unseen in zip(rules.ids, first.unseen, strict=True)
        if unseen
    ]
    if hidden:
        raise ModelError(
            f"{what} cannot see {', '.join(hidden)}, so it may decide about no image: take "
            "these prompts out, or the cascade"
        )
    missing = [
        rule.id
        for rule in rules.concepts
        if rule.threshold.kind == "fpr"
        and (*model, first.space, rule.id) not in (rules.locked or {})
    ]
    if missing:
        raise ModelError(
            f"{what} has no calibrated threshold for {', '.join(missing)}, so the second model "
            f"would judge every image: run latentguard calibrate with --model {model.name}, too"
        )
