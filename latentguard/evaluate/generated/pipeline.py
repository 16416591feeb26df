"""A pipeline that ends with its latents, which nothing decodes."""

from __future__ import annotations

from typing import Any

from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.generators import PipelineGenerator, Shown
from latentguard.evaluate.generate.settings import Settings
from latentguard.guard.layout import layout_of, space_of
from latentguard.spaces.preview import rgb_preview


class LatentsGenerator(PipelineGenerator):
    """A pipeline of diffusers, called for its final latents. Pictures are their linear view.

    Raises as `PipelineGenerator` does, and GuardError for a pipeline whose latents are not known to
    be read rightly.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._layout = layout_of(self.pipe, space_of(self.pipe))

    def describe(self) -> dict[str, Any]:
        """As of the pipeline, and that it does not decode."""
        return {**super().describe(), "output_type": "latent"}

    def arguments(self, asked: Asked) -> dict[str, Any]:
        """As of the pipeline, for latents."""
        return {**super().arguments(asked), "output_type": "latent"}

    def show(self, images: Any) -> Shown:
        """The latents of the first image, on the CPU, and their linear view."""
        from PIL import Image

        latents = self._layout.read(images[:1].detach().cpu(), self._pixels()).to_spatial()
        pixels = rgb_preview(latents, latents.space.vae_scale_factor, "bicubic")[0]
        return Shown(Image.fromarray(pixels), latents, {})

    def _pixels(self) -> tuple[int, int] | None:
        """The size of an image: as it is set, or else as the pipeline makes them."""
        settings = self._settings
        cells = getattr(self.pipe, "default_sample_size", None)
        usual = None if cells is None else int(cells) * int(self.pipe.vae_scale_factor)
        height, width = settings.height or usual, settings.width or usual
        return None if height is None or width is None else (height, width)
