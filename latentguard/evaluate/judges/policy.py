"""A policy of one's own as the judge: on the latents of a run, or on its pictures, encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentguard.encode import Autoencoder, load_autoencoder
from latentguard.errors import LatentsError, UsageError
from latentguard.evaluate.generate.judging import Judgment
from latentguard.files import load_latents
from latentguard.policy import load_policy
from latentguard.scorer import Scorer
from latentguard.spaces import Latents


class PolicyJudge:
    """Flags what a policy does not allow: what it asks to review, and what it blocks or steers.

    policy: a shipped policy's name, or a path. model: as for `Scorer`.
    autoencoder: encodes the pictures, as for `load_autoencoder`; None reads the run's latents,
        which the exact generator leaves.
    """

    def __init__(
        self,
        policy: str | Path,
        model: str = "auto",
        autoencoder: Path | None = None,
        space: str | None = None,
    ) -> None:
        self._policy = load_policy(policy)
        self.name = f"policy-{self._policy.name}"
        self._autoencoder: Autoencoder | None = None
        if autoencoder is not None:
            self._autoencoder = load_autoencoder(autoencoder, space)
            space = self._autoencoder.space.name
        if model == "auto" and space is None and self._policy.space is None:
            raise UsageError(
                f"the judge policy:{policy} needs --judge-model or --judge-autoencoder, or a "
                "policy that names its space, to know which latents it is of"
            )
        self._scorer = Scorer(self._policy, model, space=space or self._policy.space)

    def describe(self) -> dict[str, Any]:
        """Policy and model, by digest."""
        encoder = self._scorer.encoder
        return {
            "judge": self.name,
            "policy_sha256": self._policy.sha256,
            "model": encoder.name,
            "model_sha256": encoder.sha256,
            "autoencoder_sha256": None if self._autoencoder is None else self._autoencoder.sha256,
        }

    def judge(self, picture: Path, latents: Path | None) -> Judgment:
        """The policy's decision; the score is the highest probability of a concept."""
        (verdict,) = self._scorer.verdicts(self._read(picture, latents))
        scores = [concept.probability for concept in verdict.concepts if concept.covered]
        score = round(float(max(scores, default=0.0)), 6)
        return Judgment(verdict.decision != "allow", score, verdict.reason or verdict.decision)

    def _read(self, picture: Path, latents: Path | None) -> Latents:
        if self._autoencoder is None:
            if latents is None:
                raise LatentsError(
                    f"{picture}: the run has no latents of it; --judge-autoencoder encodes pictures"
                )
            return load_latents(latents)
        from PIL import Image

        rgb = np.asarray(Image.open(picture).convert("RGB"), np.float32) / 255
        multiple = self._autoencoder.multiple
        height, width = (side // multiple * multiple for side in rgb.shape[:2])
        pixels = torch.from_numpy(rgb[:height, :width]).permute(2, 0, 1)[None]
        return self._autoencoder.encode(pixels)
