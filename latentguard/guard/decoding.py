"""What a pipeline gives its VAE for latents that were judged, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentguard.errors import LatentsError
from latentguard.guard.components import decoder_of
from latentguard.guard.layout import is_tiny, space_of
from latentguard.guard.tensors import equal
from latentguard.spaces import Latents, LatentSpace


@dataclass(frozen=True)
class Decoding:
    """How a pipeline unscales: the numbers of its VAE as they were when the call began.

    What the VAE is given later counts as judged only where it is, bit for bit, what these numbers
    and the pipelines' own arithmetic make of judged latents. Anything else, a sum in another order
    or numbers that were changed meanwhile, is judged as it is.

    scaled: the VAE decodes scaled latents (an AutoencoderTiny).
    factor, shift: of the VAE's config. mean, std: per channel, in the dtype and on the device that
        the VAE has them, of [C] channels or of [4 C] packed ones; None where it has none.
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
        if is_tiny(vae):
            return cls(scaled=True)
        try:
            own = space_of(pipe)
        except LatentsError:
            return None
        if (own.name, own.scale, own.shift) != (space.name, space.scale, space.shift):
            return None
        if space.name == "flux2":
            variance = vae.bn.running_var.detach().clone()
            deviation = torch.sqrt(variance + config.batch_norm_eps)
            return cls(False, mean=vae.bn.running_mean.detach().clone(), std=deviation)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        return cls(
            False,
            float(config.scaling_factor),
            config.get("shift_factor"),
            None if mean is None else torch.tensor(mean).flatten(),
            None if std is None else torch.tensor(std).flatten(),
        )

    def rows(self, latents: Latents, z: Tensor) -> list[int] | None:
        """Which of these latents, which are scaled, the VAE is given as `z` [N, C, H, W].

        One index for each of `z`; None where some of it is none of them.
        """
        x = latents.to_spatial().tensor
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
            if self.factor is None:
                yield space.unpatchify(space.patchify(x) * std + mean)
            else:
                yield x * std / self.factor + mean
        elif self.factor is not None:
            yield x / self.factor
            yield 1 / self.factor * x
            if self.shift is not None:
                yield x / self.factor + self.shift


def _index(row: Tensor, batch: Tensor) -> int | None:
    return next((i for i, other in enumerate(batch) if equal(other, row)), None)
