"""Policies whose verdicts are known beforehand, and an encoder for spaces that have no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard import Latents, Policy
from latentguard.encoders import Features, Head
from latentguard.policy import parse_policy

ALWAYS, NEVER = 0.0, 1.0
"""Probabilities that every image reaches, and none."""


def policy(
    threshold: float = NEVER, action: str = "block", extra: str = "", concept: str = ""
) -> Policy:
    """One concept, `revolver`, with a threshold of your choice."""
    text = f"""
schema_version: 1
name: test
version: "1"
contrast: [dog, house, landscape]
{extra}
concepts:
  - id: guns
    category: weapons
    prompts: [revolver]
    threshold: {{probability: {threshold}}}
    action: {action}
    {concept}
"""
    return parse_policy(text.encode(), "test.yaml")


class LinearEncoder:
    """A linear encoder of any space, drawn from a seed: what it says means nothing, but it is
    differentiable, and tells images apart."""

    name = "linear"
    logit_scale = 10.0
    head = Head()
    neutral_prompts = ("nothing",)
    always_neutral = False
    uses_templates = False
    notes = "random"
    min_coverage = 0.0
    needs_scaled = True
    dim = 16
    dtype = torch.float32

    def __init__(self, space: str, channels: int) -> None:
        self.space = space
        self.device = torch.device("cpu")
        self.sha256 = hashlib.sha256(space.encode()).hexdigest()
        generator = torch.Generator().manual_seed(1)
        self._weight = torch.randn(16, channels * 16, generator=generator)
        self.calls = 0

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Features:
        self.calls += 1
        pooled = F.adaptive_avg_pool2d(latents.float(), 4).flatten(1) @ self._weight.T
        return Features(pooled, pooled[:, None], (1, 1))

    def encode_latents(self, latents: Latents) -> Tensor:
        return F.normalize(self.features(latents.tensor).pooled, dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            rows.append(torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)))
        return F.normalize(torch.stack(rows), dim=-1)

    def coverage(self, texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts))

    def to(self, device: Any) -> Self:
        return self
