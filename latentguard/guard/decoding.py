"""What a pipeline gives its VAE for latents that were judged, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentguard.guard.components import decoder_of
from latentguard.guard.layout import batch_norm_eps, by_channel, is_tiny, numbers_of
from latentguard.guard.tensors import equal
from latentguard.spaces import Latents, LatentSpace


@dataclass(frozen=True)
class Decoding:
    """How a pipeline unscales: the numbers of its VAE as they were when the call began.

    What the VAE is given later counts as judged only where it is, bit for bit, what these numbers
    and the pipelines' own arithmetic make of judged latents. Anything else, a sum in another order
    or numbers that were changed meanwhile, is judged as it is.

    scaled: the VAE decodes scaled latents (an AutoencoderTiny, or a space without a scaling).
    factor, shift: of the VAE's config. mean, std: per channel, in the dtype and on the device that
        the VAE has them, of [C] channels or of the packed ones; None where it has none.
    """

    scaled: bool
    factor: float | None = None
    shift: float | None = None
    mean: Tensor | None = None
    std: Tensor | None = None

    @classmethod
    def of(cls, pipe: Any, space: LatentSpace) -> Decoding | None:
        """That of a pipeline, None where its VAE's numbers are not those of the space."""
        vae = decoder_of(pipe)
        config = getattr(vae, "config", None)
        if config is None:
            return None
        if is_tiny(vae) or (space.scale, space.shift) == (1.0, 0.0):
            return cls(scaled=True)
        if space.statistics_of_vae == "batch_norm":
            return _batch_normalized(cls, pipe, vae)
        numbers = numbers_of(pipe, config)
        if numbers is None or not numbers.scale_as(space):
            return None
        return cls(False, numbers.factor, numbers.shift, numbers.mean, numbers.std)

    def rows(self, latents: Latents, z: Tensor) -> list[int] | None:
        """Which of these latents, which are scaled, the VAE is given as `z`.

        z: [N, C, H, W], or [N, C, 1, H, W] with an axis of frames.

        One index for each of `z`; None where some of it is none of them.
        """
        x = latents.to_spatial().tensor
        if z.ndim == 5 and z.shape[2] == 1:
            z = z.squeeze(2)
        for dtype in dict.fromkeys((x.dtype, z.dtype, torch.float32)):
            for form in self._forms(x.to(dtype), latents.space):
                form = form.to(z.device, z.dtype)
                if equal(form, z):
                    return list(range(len(z)))
                found = [_index(one, form) for one in z] if len(z) != len(form) else [None]
                if None not in found:
                    return [row for row in found if row is not None]
        return None

    def _forms(self, x: Tensor, space: LatentSpace) -> Iterator[Tensor]:
        """As diffusers' pipelines write it, in the dtype of `x` [B, C, H, W]."""
        if self.scaled:
            yield x
        elif self.mean is not None and self.std is not None:
            mean, std = (values.view(1, -1, 1, 1).to(x) for values in (self.mean, self.std))
            inverse = 1 / std  # after the cast, as the pipelines compute it
            if len(self.mean) > space.channels:
                x = space.patchify(x)
                yield space.unpatchify(x * std + mean)
                yield space.unpatchify(x / inverse + mean)
                return
            if self.factor is not None:
                yield x * std / self.factor + mean
            if self.factor in (None, 1.0):
                yield x * std + mean
                yield x / inverse + mean
        elif self.factor is not None and self.shift:
            yield x / self.factor + self.shift
        elif self.factor is not None:
            yield x / self.factor
            yield 1 / self.factor * x


def _batch_normalized(cls: type[Decoding], pipe: Any, vae: Any) -> Decoding | None:
    """FLUX.2's numbers are buffers of its VAE."""
    if not hasattr(vae, "bn"):
        return None
    mean, variance = (
        by_channel(pipe, values.detach()).clone()
        for values in (vae.bn.running_mean, vae.bn.running_var)
    )
    eps = batch_norm_eps(pipe, vae.config.batch_norm_eps)
    return cls(False, mean=mean, std=torch.sqrt(variance + eps))


def _index(row: Tensor, batch: Tensor) -> int | None:
    return next((i for i, other in enumerate(batch) if equal(other, row)), None)
