"""Cascades: a cheap model judges first, and a better one only where the first is not sure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from latentguard.encoders import load_encoder
from latentguard.errors import ModelError
from latentguard.policy import Policy
from latentguard.spaces import Latents
from latentguard.verdict import Verdict, resolve_threshold

if TYPE_CHECKING:
    import torch

    from latentguard.scorer import Scorer


class FirstStage:
    """The first model of a policy's `cascade`.

    It is sure of an image where every concept's margin is further from its threshold than the
    policy's `unsure`, and nothing went wrong; its verdict stands then.

    Args:
        policy: with a `cascade`. space: of the second model, whose latents it has to read.

    Raises ModelError where it reads another space, or cannot see all concepts: it would then be
    sure of nothing, and cost time for every image.
    """

    def __init__(self, policy: Policy, space: str, device: torch.device | str | None) -> None:
        from latentguard.scorer import Scorer

        assert policy.cascade is not None
        self._unsure = policy.cascade.unsure
        encoder = load_encoder(policy.cascade.first, device)
        what = f"policy '{policy.name}': cascade.first {encoder.name}"
        if encoder.space != space:
            raise ModelError(f"{what} reads {encoder.space} latents, the second model {space}")
        self._scorer: Scorer = Scorer(policy.model_copy(update={"cascade": None}), encoder)
        hidden = [
            concept.id
            for concept, seen in zip(policy.concepts, self._scorer.bank.covered, strict=True)
            if not seen
        ]
        if hidden:
            raise ModelError(
                f"{what} cannot see {', '.join(hidden)}, so the second model would judge every "
                "image: take these concepts out, or the cascade"
            )

    def verdicts(
        self, latents: Latents, noise_level: float, final: bool
    ) -> tuple[list[Verdict], list[int]]:
        """Its verdicts, and the indices of the images that it is not sure of."""
        verdicts = self._scorer.verdicts(latents, noise_level, final)
        unsure = [i for i, one in enumerate(verdicts) if not self._sure(one)]
        by = f" (by {self._scorer.encoder.name}, the first model of the cascade)"
        return [replace(one, reason=one.reason + by) for one in verdicts], unsure

    def _sure(self, verdict: Verdict) -> bool:
        if verdict.error is not None:
            return False
        plain, encoder = self._scorer.plain, self._scorer.encoder
        concepts = {concept["id"]: concept for concept in plain["concepts"]}
        for score in verdict.concepts:
            if not score.judged:
                continue
            limit = resolve_threshold(
                concepts[score.id],
                plain,
                (encoder.name, encoder.sha256),
                encoder.space,
                verdict.noise_level,
                logit_scale=encoder.logit_scale,
            )
            if abs(score.margin - limit) <= self._unsure:
                return False
        return True
