"""Cascades: a cheap model judges first, and a better one only where the first is not sure.

PyTorch's Scorer and the runtime's Guard judge by the same rule, this one; plain data, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from latentguard.errors import ModelError
from latentguard.verdict import Verdict, resolve_threshold, unseen_prompts

_MARK = "the first model of the cascade)"


class Cascade:
    """What a policy's first model may decide, and what it passes on.

    It is sure of an image where every concept's margin is further from its threshold than the
    policy's `unsure`, and nothing went wrong; its verdict stands then.

    Args:
        policy: `Policy.plain()`, with a `cascade`.
        model, space, logit_scale, covered: of the first model: (name, sha256), what it reads, and
            which of the policy's concepts it sees.
        seen: which of the policy's prompts it sees; None is all of the covered concepts'.
        reads: the space of the second model.

    Raises ModelError where the first model reads another space, or cannot see all prompts, as it
    would then allow what only the second model can see; also where it has no calibrated threshold
    for a concept that asks for a false-positive rate, as it would then be sure of nothing.
    """

    def __init__(
        self,
        policy: Mapping[str, Any],
        model: tuple[str, str],
        space: str,
        logit_scale: float,
        covered: Sequence[bool],
        *,
        reads: str,
        seen: Sequence[bool] | None = None,
    ) -> None:
        self._policy = policy
        self._concepts = {concept["id"]: concept for concept in policy["concepts"]}
        self._unsure = float(policy["cascade"]["unsure"])
        self._model, self._space, self._logit_scale = model, space, logit_scale
        what = f"policy '{policy['name']}': cascade.first {model[0]}"
        if space != reads:
            raise ModelError(f"{what} reads {space} latents, the second model {reads}")
        hidden = [
            f"{concept['id']} ({', '.join(repr(prompt) for prompt in unseen)})"
            for concept, unseen in zip(
                policy["concepts"], unseen_prompts(policy, covered, seen), strict=True
            )
            if unseen
        ]
        if hidden:
            raise ModelError(
                f"{what} cannot see {', '.join(hidden)}, so it may decide about no image: take "
                "these prompts out, or the cascade"
            )
        lock = policy.get("lock") or {"entries": ()}
        keys = ("model", "model_sha256", "space", "concept")
        calibrated = {tuple(entry[key] for key in keys) for entry in lock["entries"]}
        missing = [
            concept["id"]
            for concept in policy["concepts"]
            if concept["threshold"]["kind"] == "fpr"
            and (*model, space, concept["id"]) not in calibrated
        ]
        if missing:
            raise ModelError(
                f"{what} has no calibrated threshold for {', '.join(missing)}, so the second model "
                f"would judge every image: run latentguard calibrate with --model {model[0]}, too"
            )

    def judge(
        self, first: Sequence[Verdict], second: Callable[[list[int]], Sequence[Verdict]]
    ) -> list[Verdict]:
        """The verdicts that stand.

        first: the first model's. second: gives the second model's for some of these images, by
        their indices; it is not called where the first model is sure of all.
        """
        by = f" (by {self._model[0]}, {_MARK}"
        verdicts = [replace(verdict, reason=verdict.reason + by) for verdict in first]
        unsure = [index for index, verdict in enumerate(first) if not self._sure(verdict)]
        if unsure:
            for index, verdict in zip(unsure, second(unsure), strict=True):
                verdicts[index] = verdict
        return verdicts

    def _sure(self, verdict: Verdict) -> bool:
        if verdict.error is not None:
            return False
        for score in verdict.concepts:
            if not score.judged:
                continue
            limit = resolve_threshold(
                self._concepts[score.id],
                self._policy,
                self._model,
                self._space,
                verdict.noise_level,
                logit_scale=self._logit_scale,
            )
            # Not "<=": a NaN is never sure.
            if not abs(score.margin - limit) > self._unsure:
                return False
        return True


def by_first(verdict: Verdict) -> bool:
    """Whether the first model of a cascade decided."""
    return verdict.reason.endswith(_MARK)
