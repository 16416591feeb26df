"""An encoder of pixels behind a decoder: what a reward on decoded pictures reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.encoders import EncoderBase, Features, Head
from latentguard.encoders.base import clean_estimate
from latentguard.errors import LatentsError, ModelError
from latentguard.evaluate.generate.generators import module_sha256
from latentguard.spaces import Latents, LatentSpace
from latentguard.text import first_line

Decode = Callable[[Latents], Tensor]
"""From clean latents [B, ...] to RGB [B, 3, H, W] of 0 to 1, differentiable."""

NEUTRAL_PROMPTS = ("a photo", "a picture of something", "a drawing", "a painting")


class PixelEncoder(EncoderBase):
    """A CLIP of open_clip that reads latents through a decoder.

    It is an encoder as any other, so policies and prompts score with it; what it costs is the
    decoder. Gradients flow to the latents. Pictures are resized by their shorter side (bicubic,
    antialiased), cut at the center, and normalized, as CLIP's own preprocessing does.

    Args:
        architecture: a name of open_clip, such as ViT-B-16.
        weights: one of open_clip's names for them, which it fetches, or a file.
        decode: of the generator. space: of its latents. device: where the CLIP runs; in float32.

    Raises ModelError where open_clip has no such model, or weights cannot be had.
    """

    head = Head()
    neutral_prompts = NEUTRAL_PROMPTS
    always_neutral = False
    uses_templates = True
    min_coverage = 0.5
    needs_scaled = True
    dtype = torch.float32
    notes = "open_clip on decoded pictures"

    def __init__(
        self,
        architecture: str,
        weights: str,
        decode: Decode,
        space: LatentSpace,
        device: torch.device | str = "cpu",
    ) -> None:
        import open_clip

        try:
            self._clip: Any = open_clip.create_model(
                architecture, pretrained=weights, device=device, require_pretrained=True
            )
            self._tokenizer: Any = open_clip.get_tokenizer(architecture)
        except Exception as error:  # files, networks, names: all kinds
            raise ModelError(
                f"the pixel model {architecture!r} needs weights that open_clip can load, and "
                f"{weights!r} are none: {first_line(error)}"
            ) from error
        self._clip.eval().requires_grad_(False)
        self.name = f"pixel:{architecture}:{weights}"
        self.sha256 = module_sha256(self._clip)
        self.space = space.name
        self.logit_scale = float(self._clip.logit_scale.exp())
        size = self._clip.visual.image_size
        self._side = int(size[0] if isinstance(size, tuple | list) else size)
        numbers = (self._clip.visual.image_mean, self._clip.visual.image_std)
        self._mean, self._std = (torch.tensor(n, device=device).view(1, 3, 1, 1) for n in numbers)
        self._decode = decode
        # What `to_standard` makes of the space's latents.
        self._space = space if space.standard.scale is None else space.standard
        self.dim = int(self.encode_text(["a photo"]).shape[1])

    @property
    def device(self) -> torch.device:
        """Where the CLIP is."""
        return self._mean.device

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Features:
        """The embedding of the decoded pictures, and nothing by place."""
        clean = clean_estimate(latents, noise, alpha, sigma).to(latents)
        pictures = self._decode(Latents(clean, self._space, scaled=True)).float()
        pooled = self._clip.encode_image(self.prepared(pictures))
        return Features(pooled, pooled.new_empty(len(pooled), 0, pooled.shape[1]), (0, 0))

    def prepared(self, pictures: Tensor) -> Tensor:
        """RGB [B, 3, H, W] of 0 to 1 as the CLIP takes it, [B, 3, side, side]."""
        height, width = pictures.shape[2:]
        # Whole numbers as torchvision rounds them: of the longer side down, of the cut to even.
        size = [self._side * side // min(height, width) for side in (height, width)]
        resized = F.interpolate(pictures, size, mode="bicubic", align_corners=False, antialias=True)
        top, left = (round((side - self._side) / 2) for side in size)
        cut = resized[:, :, top : top + self._side, left : left + self._side]
        return (cut - self._mean) / self._std

    def encode_latents(self, latents: Latents) -> Tensor:
        """Unit-norm embeddings [B, dim]. Raises LatentsError for another space."""
        if latents.space.name != self.space:
            raise LatentsError(f"{self.name} reads {self.space} latents, got {latents.space}")
        tensor = latents.to_spatial().to_standard(True).tensor.to(self.device)
        return F.normalize(self.features(tensor).pooled, dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings [P, dim]; what does not fit CLIP's 77 tokens is cut, as there."""
        ids = self._tokenizer(list(texts)).to(self.device)
        return F.normalize(self._clip.encode_text(ids).float(), dim=-1)

    def coverage(self, texts: Sequence[str]) -> Tensor:
        """All ones [P]: its text tower reads any prompt."""
        return torch.ones(len(texts), device=self.device)

    def to(self, device: torch.device | str) -> Self:
        """Move the CLIP; the decoder is the generator's, and stays."""
        self._clip.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self
