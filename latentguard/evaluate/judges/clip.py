"""CLIP's image tower, for the judges that read its embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from latentguard.errors import ModelError
from latentguard.evaluate.generate.generators import module_sha256
from latentguard.text import first_line

CLIP = "ViT-L-14-quickgelu"
"""OpenAI's weights were trained with the quick GELU."""


class ClipPictures:
    """Embeds picture files by CLIP.

    weights: a file of OpenAI's CLIP weights, or "openai", which open_clip fetches.
    name: the model's in open_clip.

    Attributes: width, of an embedding; sha256, of the weights; name; device.

    Raises ModelError where the weights cannot be had.
    """

    def __init__(
        self, weights: str | Path = "openai", name: str = CLIP, device: str = "cpu"
    ) -> None:
        import open_clip

        try:
            model, _, prepare = open_clip.create_model_and_transforms(
                name, pretrained=str(weights), device=device
            )
        except Exception as error:  # files, networks, names: all kinds
            raise ModelError(
                f"judging needs the weights of CLIP {name}, and open_clip cannot load "
                f"{str(weights)!r}: {first_line(error)}"
            ) from error
        self._visual, self._prepare = model.visual.eval(), prepare
        self.name, self.device = name, device
        self.width = int(model.visual.output_dim)
        self.sha256 = module_sha256(model.visual)

    @torch.inference_mode()
    def embed(self, picture: Path) -> Tensor:
        """[1, width] float32, not of unit norm."""
        from PIL import Image

        with Image.open(picture) as opened:
            pixels = self._prepare(opened.convert("RGB"))[None].to(self.device)
        found: Tensor = self._visual(pixels).float()
        return found
