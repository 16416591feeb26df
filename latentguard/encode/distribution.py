"""What an encoder says of a picture's latents: where they are, and how far they spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distribution:
    """mean [B, C, h, w], and the deviation of the same shape; None of encoders that have none."""

    mean: Tensor
    std: Tensor | None = None

    def sample(self, seeds: Sequence[int]) -> Tensor:
        """One of each, by a seed for each picture: batches and devices do not matter.

        As diffusers' `latent_dist.sample` of a batch of one with such a generator on the CPU.
        """
        if self.std is None:
            return self.mean
        noise = [
            torch.randn(
                self.mean.shape[1:],
                generator=torch.Generator().manual_seed(seed),
                dtype=self.mean.dtype,
            )
            for seed in seeds
        ]
        return self.mean + self.std * torch.stack(noise).to(self.mean.device)
