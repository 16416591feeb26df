"""Judging with torch: a policy bound to encoders by Scorers."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from latentguard.errors import ModelError
from latentguard.policy import Policy, load_policy
from latentguard.scan.judging import Judge, describe
from latentguard.scan.summary import ModelInfo
from latentguard.verdict import Verdict, unseen_prompts

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from latentguard.encoders import Encoder
    from latentguard.scorer import Scorer
    from latentguard.spaces import LatentArray, LatentSpace


class ScorerModel:
    """A Scorer, and what a scan says of it."""

    def __init__(self, scorer: Scorer, info: ModelInfo) -> None:
        self.info = info
        self._scorer = scorer

    def verdicts(self, latents: LatentArray) -> list[Verdict]:
        return self._scorer.verdicts(latents.torch())

    def heatmaps(self, latents: LatentArray) -> NDArray[np.float32]:
        return self._scorer.heatmaps(latents.torch())


class ScorerJudge(Judge):
    """Judges with one model, or (`auto`) with the one that the policy names, or with the best one
    on this machine for each space.

    Raises as `scan_files` does.
    """

    def __init__(
        self,
        policy: Policy | str | Path,
        model: Encoder | str | Path,
        device: torch.device | str | None,
        space: str | LatentSpace | None,
    ) -> None:
        self._policy = load_policy(policy)
        super().__init__(self._policy.plain())
        _check_device(device)
        self._device = device
        self._models: dict[str, ScorerModel | str] = {}
        self._fixed: ScorerModel | None = None
        if model == "auto" and self._policy.model is not None:
            model = self._policy.model
        if model != "auto":
            self._fixed = self._bind(model, space)

    def model_of(self, space: str) -> ScorerModel | str:
        if self._fixed is not None:
            reads = self._fixed.info.space
            if reads == space:
                return self._fixed
            return f"model {self._fixed.info.id.name} reads {reads} latents, not {space}"
        if space not in self._models:
            self._models[space] = self._choose(space)
        return self._models[space]

    def _bind(self, model: Encoder | str | Path, space: str | LatentSpace | None) -> ScorerModel:
        from latentguard.scorer import Scorer

        begun = perf_counter()
        scorer = Scorer(self._policy, model, self._device, space)
        encoder = scorer.encoder
        info = describe(
            self.plain,
            (encoder.name, encoder.sha256),
            encoder.space,
            str(getattr(encoder, "notes", "") or ""),
            unseen_prompts(self.plain, seen=scorer.bank.seen),
            encoder.logit_scale,
            scorer.bank.unseen_contrast,
        )
        self.models.append(info)
        self.loading += perf_counter() - begun
        return ScorerModel(scorer, info)

    def _choose(self, space: str) -> ScorerModel | str:
        from latentguard.encoders import best_encoder

        if self._policy.space not in (None, space):
            return f"policy '{self._policy.name}' is written for {self._policy.space}, not {space}"
        try:
            name = best_encoder(space)
        except ModelError as error:
            return str(error)
        self._note_bundled(name, space)
        return self._bind(name, space)

    def _note_bundled(self, name: str, space: str) -> None:
        from latentguard.encoders.catalog import CATALOG

        if not CATALOG[name].bundled:
            return
        better = next((e.name for e in CATALOG.values() if e.space == space and not e.bundled), "")
        hint = f"; for a stronger one: latentguard models get {better}" if better else ""
        self.notes.append(f"{space} latents are judged by the bundled model {name}{hint}")


def _check_device(device: torch.device | str | None) -> None:
    """Raises ModelError for a device that this machine does not have."""
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise ModelError(f"device {str(device)!r} cannot be used: {first[:300]}") from error
