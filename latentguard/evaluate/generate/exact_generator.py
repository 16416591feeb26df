"""`--generator exact`: a benchmark end to end without weights, on pictures whose class is known."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from latentguard.errors import UsageError
from latentguard.evaluate.classes import read_names
from latentguard.evaluate.exact import (
    exact_flux2_pipeline,
    exact_sdxl_pipeline,
    outcome,
    prompt,
)
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.generators import Shown
from latentguard.files import load_latents
from latentguard.guard.layout import layout_of, space_of
from latentguard.spaces import Latents, LatentSpace
from latentguard.spaces.preview import linear_rgb, rgb_preview

LOOPS = ("sdxl", "flux2")
STEPS = 30


class ExactGenerator:
    """SDXL's or FLUX.2's loop around the exact denoiser of a set of latents.

    A prompt asks for the class whose name stands in it (the longest one, if several do). Its
    pictures are the linear view of the latents, as nothing is decoded.

    Args:
        path: a file of latents of one size. labels: a file with the class of each, one a line;
            None takes what stands before the first "/" of the ids.
        loop: "sdxl" or "flux2". steps: of each generation.
        leak: the chance, about, that a prompt leaves to the rest of the set. With 0 nothing can
            be steered.

    Raises:
        LatentsError: the set cannot be read, or has another number of labels.
    """

    def __init__(
        self,
        path: str | Path,
        labels: Path | None = None,
        *,
        loop: str = "sdxl",
        steps: int | None = None,
        guidance: float | None = None,
        leak: float = 0.0,
    ) -> None:
        if loop not in LOOPS:
            raise UsageError(f"the loop must be one of {', '.join(LOOPS)}, got {loop!r}")
        latents = load_latents(path).to_scaled()
        latents = Latents(latents.tensor.float(), latents.space, True, ids=latents.ids)
        names = None if labels is None else read_names(labels)
        make = exact_sdxl_pipeline if loop == "sdxl" else exact_flux2_pipeline
        self.pipe = make(latents, names)
        self.pipe.set_progress_bar_config(disable=True)
        self.space: str | None = latents.space.name
        model = self.pipe.unet if loop == "sdxl" else self.pipe.transformer
        self._photos = model.photos
        self._loop = loop
        self._steps = STEPS if steps is None else steps
        self._guidance = guidance
        self._leak = leak

    def describe(self) -> dict[str, Any]:
        """The set by digest, loop, steps, guidance and leak."""
        found = hashlib.sha256(self._photos.tensor.contiguous().numpy().tobytes())
        found.update("\n".join(self._photos.labels).encode())
        return {
            "kind": "exact",
            "set_sha256": found.hexdigest(),
            "photos": len(self._photos),
            "loop": self._loop,
            "scheduler": type(self.pipe.scheduler).__name__,
            "steps": self._steps,
            "guidance": self._guidance,
            "leak": self._leak,
        }

    def arguments(self, asked: Asked) -> dict[str, Any]:
        """The class that the prompt names, as embeddings. Raises UsageError where it names none."""
        height, width = self._photos.tensor.shape[2:]
        factor = self._photos.space.vae_scale_factor
        named = prompt(
            self.pipe, [named_class(asked.prompt, self._photos.classes)], leak=self._leak
        )
        guidance = asked.guidance if self._guidance is None else self._guidance
        return {
            **named,
            "num_inference_steps": self._steps,
            "height": height * factor,
            "width": width * factor,
            "output_type": "latent",
            **({} if guidance is None else {"guidance_scale": guidance}),
        }

    def show(self, images: Any) -> Shown:
        """The linear view of the latents, and the class of the photo that they became."""
        from PIL import Image

        tensor = images[:1].detach()
        became = outcome(self.pipe, tensor)
        space = space_of(self.pipe, LatentSpace.of(self._photos.space))
        height, width = (side * space.vae_scale_factor for side in self._photos.tensor.shape[2:])
        latents = layout_of(self.pipe, space).read(tensor, (height, width)).to_spatial()
        pixels = rgb_preview(latents, space.vae_scale_factor, "bicubic")[0]
        facts = {"became": became.labels[0], "distance": round(float(became.distance[0]), 6)}
        return Shown(Image.fromarray(pixels), latents, facts)

    def decode(self, latents: Latents) -> Tensor:
        """The linear view, as large as a decoded picture; the VAE of the loop shows nothing."""
        view = (linear_rgb(latents) + 1) / 2
        factor = self._photos.space.vae_scale_factor
        return F.interpolate(view.clamp(0, 1), scale_factor=factor, mode="bilinear")


def named_class(text: str, classes: Sequence[str]) -> str:
    """The longest class name that stands in a text as words; hyphens may be written as spaces."""
    words = f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "
    found = [
        name for name in classes if f" {' '.join(re.findall(r'[a-z0-9]+', name.lower()))} " in words
    ]
    if not found:
        raise UsageError(
            f"the exact generator makes what a prompt names, and this one names no class of its "
            f"set: {text[:80]!r}; the classes are {', '.join(classes)}"
        )
    return max(found, key=len)
