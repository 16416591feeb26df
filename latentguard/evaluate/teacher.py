"""The pixel-space ceiling: what the nano encoders' teacher scores on the pictures themselves.

Its posteriors go through the same text side and the same operator as a nano encoder's, so the
difference between the two is what reading latents, and being small, costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from latentguard import ops
from latentguard.adapt.teacher import load_teacher
from latentguard.encoders.base import Features
from latentguard.encoders.nano import NanoEncoder
from latentguard.scorer import Scorer
from latentguard.spaces import Latents


class PixelTeacher:
    """EfficientNet-Lite2 as an Encoder that reads RGB pictures instead of latents.

    like: the nano encoder whose text side, score and limits it shares.
    """

    def __init__(self, like: NanoEncoder) -> None:
        self._teacher = load_teacher()
        self._text = like
        self.name = "teacher on pixels"
        self.sha256 = ""
        self.space = like.space
        self.needs_scaled = like.needs_scaled
        self.dim = like.dim
        self.logit_scale = like.logit_scale
        self.head = like.head
        self.neutral_prompts = like.neutral_prompts
        self.always_neutral = like.always_neutral
        self.uses_templates = like.uses_templates
        self.notes = "EfficientNet-Lite2 with ImageNet weights, on pixels."
        self.min_coverage = like.min_coverage
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Features:
        """Square roots of class posteriors of RGB pictures [B, 3, H, W] in [0, 1]."""
        if latents.dim() != 4 or latents.shape[1] != 3 or noise is not None:
            raise ValueError(
                f"the teacher reads RGB pictures [B, 3, H, W], got {list(latents.shape)}"
            )
        root = torch.exp(0.5 * torch.log_softmax(self._teacher.logits(latents).float(), -1))
        return Features(root, root[:, None], (1, 1))

    def encode_latents(self, latents: Latents) -> Tensor:
        """Not possible: raises ValueError."""
        raise ValueError("the teacher reads pictures, not latents: use features(pictures)")

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """As the nano encoder's."""
        return self._text.encode_text(texts)

    def coverage(self, texts: Sequence[str]) -> Tensor:
        """As the nano encoder's."""
        return self._text.coverage(texts)

    def to(self, device: torch.device | str) -> Self:
        """The CPU only."""
        if torch.device(device).type != "cpu":
            raise ValueError(f"the teacher runs on the CPU, not on {device}")
        return self


@torch.inference_mode()
def margins_of_embeddings(scorer: Scorer, embeddings: Tensor) -> Tensor:
    """Margins [B, K] of embeddings [B, dim] that are there already, as `Scorer.score` has them.

    Scoring a set against many policies then encodes it once.
    """
    bank = scorer.bank
    _, margin, _ = ops.concept_similarity(
        embeddings.contiguous(),
        None,
        None,
        1e-5,
        None,
        bank.embeddings,
        bank.segments,
        bank.contrast,
        bank.contrast_segments,
        scorer.encoder.logit_scale,
    )
    return margin
