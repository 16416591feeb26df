"""Pipelines to serve: any of diffusers, or one that needs no weights."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch

from latentguard.errors import ModelError
from latentguard.evaluate.exact import exact_flux2_pipeline, prompt
from latentguard.evaluate.generate.exact_generator import named_class
from latentguard.files import load_latents
from latentguard.guard.layout import layout_of, space_of
from latentguard.spaces import Latents, LatentSpace
from latentguard.spaces.preview import linear_rgb
from latentguard.text import first_line

PICTURES = Path(__file__).resolve().parent.parent / "latents.pt"
STEPS = 20


@dataclass(frozen=True)
class Choice:
    """Which pipeline, and how it is run.

    generator: "diffusers" for `pipeline`, a path or a name; "exact" for the pictures in `latents`,
    which a prompt names. dtype: of torch, by name. device: a GPU where there is one, else the CPU.
    call: further arguments of each call, as JSON, {"height": 512} for example.
    """

    generator: str = "diffusers"
    pipeline: str | None = None
    latents: str = str(PICTURES)
    dtype: str = "bfloat16"
    device: str | None = None
    call: str = "{}"


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options of a `Choice`."""
    kinds = ("diffusers", "exact")
    parser.add_argument("--pipeline", help="of diffusers: its path or name")
    parser.add_argument("--generator", choices=kinds, default="diffusers", help="exact: no weights")
    parser.add_argument("--latents", default=str(PICTURES), help="what the exact one can make")
    parser.add_argument("--dtype", default="bfloat16", help="of the pipeline's weights")
    parser.add_argument("--device", help="a GPU where there is one, else the CPU")
    parser.add_argument("--call", default="{}", help="further arguments of each call, as JSON")


def chosen(options: argparse.Namespace) -> Choice:
    """What was chosen by the options."""
    return Choice(**{field.name: getattr(options, field.name) for field in fields(Choice)})


class Painter(Protocol):
    """A pipeline, and how a prompt becomes the arguments of a call."""

    pipe: Any

    def arguments(self, text: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
        """Of `pipe(...)`, without the random generator. Raises ModelError for a prompt that cannot
        be asked for."""
        ...


def painter(choice: Choice) -> Painter:
    """The pipeline that was chosen. Raises ModelError, or LatentsError for the exact one's file."""
    if choice.generator == "exact":
        return ExactPainter(choice.latents)
    if choice.pipeline is None:
        raise ModelError("say which pipeline: --pipeline PATH, or --generator exact")
    return PipelinePainter(choice)


class PipelinePainter:
    """A pipeline of diffusers."""

    def __init__(self, choice: Choice) -> None:
        device = choice.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, choice.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ModelError(f"--dtype must be a type of torch, bfloat16 say, got {choice.dtype!r}")
        self._call = _mapping(choice.call)
        load: Any = diffusers.DiffusionPipeline.from_pretrained
        try:
            self.pipe = load(choice.pipeline, torch_dtype=dtype).to(device)
        except Exception as error:  # files, configurations, networks: all kinds
            raise ModelError(
                f"{choice.pipeline}: diffusers cannot load it: {first_line(error)}"
            ) from error
        self.pipe.set_progress_bar_config(disable=True)
        self._takes = inspect.signature(inspect.unwrap(type(self.pipe).__call__)).parameters

    def arguments(self, text: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
        """What the pipeline takes of these; its own defaults for what is None."""
        asked = {"num_inference_steps": steps, "guidance_scale": guidance}
        for name, value in asked.items():
            if value is not None and name not in self._takes:
                raise ModelError(f"{type(self.pipe).__name__} takes no {name}: leave it out")
        given = {name: value for name, value in asked.items() if value is not None}
        return {"prompt": text, **self._call, **given}


class ExactPainter:
    """FLUX.2's loop around the exact denoiser of a few latents (`latentguard.evaluate.exact`).

    A generation becomes the picture whose id stands in the prompt. Nothing is decoded: in the
    place of the VAE's decoder stands the linear view of the latents.
    """

    def __init__(self, path: str) -> None:
        latents = load_latents(path).to_scaled()
        photos = Latents(latents.tensor.float(), latents.space, True, ids=latents.ids)
        self.pipe = exact_flux2_pipeline(photos)
        self.pipe.vae.decoder = View(photos.space)
        self.pipe.vae.post_quant_conv = torch.nn.Identity()
        self.pipe.set_progress_bar_config(disable=True)
        photos = self.pipe.transformer.photos
        self.classes: tuple[str, ...] = photos.classes
        height, width = photos.tensor.shape[2:]
        factor = photos.space.vae_scale_factor
        self._size = {"height": height * factor, "width": width * factor}

    def arguments(self, text: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
        """The picture that the prompt names. Raises ModelError where it names none."""
        named = prompt(self.pipe, [named_class(text, self.classes)])
        given = {} if guidance is None else {"guidance_scale": guidance}
        return {**named, **self._size, **given, "num_inference_steps": steps or STEPS}


class View(torch.nn.Module):
    """In the place of a decoder: [B, C, h, w] to the colors that the latents show, 8 times as
    large."""

    def __init__(self, space: LatentSpace) -> None:
        super().__init__()
        self._space = space

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        rgb = linear_rgb(Latents(z, self._space, scaled=True))
        factor = self._space.vae_scale_factor
        large = torch.nn.functional.interpolate(
            rgb, scale_factor=factor, mode="bicubic", align_corners=False
        )
        return large.clamp(-1, 1).to(z)


def paint_latents(
    by: Painter, text: str, seed: int, steps: int | None = None, guidance: float | None = None
) -> Latents:
    """The latents that a prompt gives, [1, C, h, w], scaled; nothing is judged or decoded.

    Raises ModelError as the painter does, LatentsError where the latents cannot be read.
    """
    pipe = by.pipe
    arguments = by.arguments(text, steps, guidance)
    generator = torch.Generator().manual_seed(seed)
    made = pipe(**arguments, generator=generator, output_type="latent").images
    space = space_of(pipe)
    side = getattr(pipe, "default_sample_size", None)
    default = side * pipe.vae_scale_factor if isinstance(side, int) else None
    height, width = (arguments.get(name, default) for name in ("height", "width"))
    # Tokens do not carry their size; where that is not known, reading them raises.
    size = None if height is None or width is None else (height, width)
    return layout_of(pipe, space).read(made[:1].detach(), size).to_spatial()


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelError(f"--call is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"--call must be a JSON object, got {text[:80]!r}")
    return found
