"""What makes the images: any pipeline of diffusers that takes a prompt."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from latentguard.errors import ModelError, UsageError
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.decoding import VaeDecoder
from latentguard.evaluate.generate.settings import Settings
from latentguard.text import first_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentguard.spaces import Latents


@dataclass(frozen=True)
class Shown:
    """What came out: a picture; the latents, where the generator gives them; and facts on it."""

    picture: Image
    latents: Latents | None
    facts: Mapping[str, Any]


class Generator(Protocol):
    """A pipeline, what it is called with, and what its output shows.

    pipe: of diffusers. space: of its latents, where its VAE does not tell.
    """

    pipe: Any
    space: str | None

    def describe(self) -> dict[str, Any]:
        """What it is and how it runs, as JSON: a run goes on only with the same."""
        ...

    def arguments(self, asked: Asked) -> dict[str, Any]:
        """Of `pipe(...)`, without the random generator."""
        ...

    def show(self, images: Any) -> Shown:
        """From an output's images; the first one counts."""
        ...

    def decode(self, latents: Latents) -> Tensor:
        """What clean latents show, RGB [B, 3, H, W] of 0 to 1, with gradients."""
        ...


class PipelineGenerator:
    """A pipeline of diffusers, by path or name.

    A safety checker of its own (Stable Diffusion 1) is taken out: the benchmarks measure what the
    model generates, and the arms what is done about it.

    Raises:
        ModelError: the pipeline cannot be loaded.
        UsageError: no such scheduler.
    """

    space: str | None = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.pipe = _load(settings)
        self._sha256 = weights_sha256(self.pipe)
        self._accepts = inspect.signature(inspect.unwrap(type(self.pipe).__call__)).parameters
        _place(self.pipe, settings)

    def describe(self) -> dict[str, Any]:
        """Class, weights by digest, scheduler, dtype, device and settings."""
        settings, scheduler = self._settings, self.pipe.scheduler
        return {
            "kind": "diffusers",
            "pipeline": settings.pipeline,
            **({} if settings.vae is None else {"vae": settings.vae}),
            "class": type(self.pipe).__name__,
            "weights_sha256": self._sha256,
            "dtype": settings.dtype,
            "device": torch.device(device_of(settings)).type,
            "offload": settings.offload,
            "scheduler": type(scheduler).__name__,
            "scheduler_config": _plain(scheduler.config),
            "steps": settings.steps,
            "guidance": settings.guidance,
            "height": settings.height,
            "width": settings.width,
            "call": dict(settings.call),
        }

    def arguments(self, asked: Asked) -> dict[str, Any]:
        """The prompt, and what settings or else the benchmark say."""
        settings = self._settings
        wanted = {
            "prompt": asked.prompt,
            "num_inference_steps": settings.steps,
            "guidance_scale": _first(settings.guidance, asked.guidance),
            "height": _first(settings.height, asked.height),
            "width": _first(settings.width, asked.width),
        }
        known = {key: value for key, value in wanted.items() if key in self._accepts}
        return {key: value for key, value in known.items() if value is not None} | dict(
            settings.call
        )

    def show(self, images: Any) -> Shown:
        """The picture as the pipeline decoded it."""
        return Shown(as_picture(images[0]), None, {})

    def decode(self, latents: Latents) -> Tensor:
        """By the pipeline's VAE. Raises ModelError where there is none."""
        return self._decoder(latents)

    @cached_property
    def _decoder(self) -> VaeDecoder:
        return VaeDecoder(self.pipe)


def device_of(settings: Settings) -> str:
    """The device that is asked for, or a GPU where there is one."""
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def weights_sha256(pipe: Any) -> str:
    """Hex digest of the names, types, shapes and bytes of all weights of a pipeline."""
    modules = {n: p for n, p in pipe.components.items() if isinstance(p, torch.nn.Module)}
    lines = [f"{name} {module_sha256(modules[name])}\n" for name in sorted(modules)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def module_sha256(module: torch.nn.Module) -> str:
    """Hex digest of the names, types, shapes and bytes of a module's weights."""
    found = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        found.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(raw.numpy())
    return found.hexdigest()


def as_picture(image: Any) -> Image:
    """A picture from what pipelines return: a PIL image, or an array [H, W, 3] of 0 to 1."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image, np.float32)
    return Image.fromarray((array * 255).round().clip(0, 255).astype(np.uint8), "RGB")


def _load(settings: Settings) -> Any:
    import diffusers

    options: dict[str, Any] = {"torch_dtype": getattr(torch, settings.dtype)}
    if settings.variant is not None:
        options["variant"] = settings.variant
    try:
        if settings.vae is not None:
            dtype = options["torch_dtype"]
            make: Any = diffusers.AutoencoderKL.from_pretrained
            options["vae"] = make(settings.vae, torch_dtype=dtype)
        load: Any = diffusers.DiffusionPipeline.from_pretrained
        pipe: Any = load(settings.pipeline, **options)
    except Exception as error:  # files, configurations, networks: all kinds
        raise ModelError(
            f"{settings.pipeline}: diffusers cannot load this pipeline: {first_line(error)}"
        ) from error
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.register_modules(safety_checker=None)
    if settings.scheduler is not None:
        made = getattr(diffusers, settings.scheduler, None)
        if made is None or not hasattr(made, "from_config"):
            raise UsageError(f"diffusers has no scheduler {settings.scheduler!r}")
        pipe.scheduler = made.from_config(pipe.scheduler.config, **settings.scheduler_options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _place(pipe: Any, settings: Settings) -> None:
    device = device_of(settings)
    if settings.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif settings.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    simple = (str, int, float, bool, list, tuple, type(None))
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in sorted(config.items())
        if isinstance(value, simple) and not key.startswith("_")
    }
