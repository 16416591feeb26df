"""From clean latents to a picture, with gradients: what a reward on pixels costs besides."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from latentguard.errors import ModelError
from latentguard.guard.components import decoder_of
from latentguard.guard.layout import is_tiny
from latentguard.spaces import Latents


class VaeDecoder:
    """A pipeline's VAE as the pipeline itself uses it, but differentiable.

    A VAE in float16 whose configuration says `force_upcast` decodes in float32, as diffusers does:
    on a copy, so that the pipeline's own is left as it is.
    Raises ModelError where the pipeline has none.
    """

    def __init__(self, pipe: Any) -> None:
        vae = decoder_of(pipe)
        if vae is None:
            raise ModelError(f"{type(pipe).__name__} has no VAE to make pixels with")
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            vae = deepcopy(vae).float()
        self._vae = vae
        self._scaled = is_tiny(vae)
        self._framed = any(isinstance(part, nn.Conv3d) for part in vae.modules())

    def __call__(self, latents: Latents) -> Tensor:
        """RGB [B, 3, H, W] of 0 to 1, in the VAE's dtype."""
        spatial = latents.to_spatial()
        tensor = (spatial.to_scaled() if self._scaled else spatial.to_raw()).tensor
        tensor = tensor.to(self._vae.device, self._vae.dtype)
        decoded = self._vae.decode(tensor[:, :, None] if self._framed else tensor).sample
        if decoded.ndim == 5:
            decoded = decoded.squeeze(2)
        pixels: Tensor = (decoded / 2 + 0.5).clamp(0, 1)
        return pixels
