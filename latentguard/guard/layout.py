"""What a diffusers pipeline's `latents` are: their space, their scaling, their layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from latentguard.errors import LatentsError
from latentguard.spaces import BatchNorm, Latents, LatentSpace

# An AutoencoderTiny does not say whose latents it decodes; the pipeline's class does. The first
# pattern that matches the name of the class, or of one that it is derived from, counts.
_BY_CLASS = (
    (r"^StableDiffusionXL", "sdxl"),
    (r"^StableDiffusion3", "sd3"),
    (r"^Flux2", "flux2"),
    (r"^Flux", "flux1"),
    (r"^(StableDiffusion|LatentConsistencyModel)", "sd1"),
)


def space_of(pipe: Any, given: LatentSpace | str | None = None) -> LatentSpace:
    """The latent space of a pipeline: what its VAE says, with the VAE's own numbers, or `given`.

    Raises LatentsError, naming the pipeline, where it cannot be known, and where `given` is another
    than the VAE's or is scaled in another way.
    """
    vae = getattr(pipe, "vae", None)
    name = type(pipe).__name__
    config = getattr(vae, "config", None)
    told: LatentSpace | LatentsError | None = None
    if config is not None and not _is_tiny(vae):
        try:
            told = LatentSpace.from_vae_config(config)
        except LatentsError as error:
            told = error
    if given is not None:
        space = LatentSpace.get(given)
        if isinstance(told, LatentSpace) and told.name != space.name:
            raise LatentsError(
                f"space is given as {space}, but the VAE of this {name} is of {told} latents: "
                "leave space out"
            )
        if isinstance(told, LatentSpace) and not told.is_scaled_as(space):
            raise LatentsError(
                f"space is given as {space} with scale {space.scale} and shift {space.shift}, but "
                f"the VAE of this {name} has scale {told.scale} and shift {told.shift}: leave "
                "space out"
            )
        return _complete(space, vae)
    if isinstance(told, LatentSpace):
        return _complete(told, vae)
    if told is not None:
        raise LatentsError(f"{name}: {told}") from told
    if config is None:
        raise LatentsError(f"{name} has no VAE that tells its latent space: give space=...")
    return _by_class(pipe)


def _is_tiny(vae: Any) -> bool:
    """Whether a VAE is an AutoencoderTiny, which decodes several spaces."""
    return type(vae).__name__ == "AutoencoderTiny" or "latent_magnitude" in vae.config


def _complete(space: LatentSpace, vae: Any) -> LatentSpace:
    """FLUX.2's statistics are buffers of its VAE."""
    if space.name != "flux2" or space.scale is not None or not hasattr(vae, "bn"):
        return space
    return space.with_batch_norm(*BatchNorm.from_vae(vae))


def _by_class(pipe: Any) -> LatentSpace:
    for cls in type(pipe).__mro__:
        for pattern, name in _BY_CLASS:
            if re.match(pattern, cls.__name__):
                return LatentSpace.get(name)
    raise LatentsError(
        f"{type(pipe).__name__} decodes with an AutoencoderTiny, which does not say which latents "
        "these are: give space=..."
    )


def read(tensor: Tensor, space: LatentSpace, size: tuple[int, int] | None) -> Latents:
    """A pipeline's `latents` with their convention: scaled, spatial or packed.

    size: height and width in latent cells, which packed latents do not carry.
    Raises LatentsError for any other shape.
    """
    if tensor.ndim == 4:
        return Latents(tensor, space, scaled=True)
    if tensor.ndim != 3:
        raise LatentsError(
            f"latents of space {space} must have 3 or 4 dimensions, got {list(tensor.shape)}"
        )
    if size is None:
        raise LatentsError("packed latents do not carry their size, and the pipeline gave none")
    return Latents(tensor, space, True, "packed", *size)


def packed_size(arguments: Mapping[str, Any], pipe: Any) -> tuple[int, int] | None:
    """Height and width in latent cells from the arguments of `prepare_latents`, in pixels there.

    Pipelines that pack round both sides down to whole 2x2 patches.
    """
    height, width = arguments.get("height"), arguments.get("width")
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return 2 * (height // (2 * factor)), 2 * (width // (2 * factor))


def forms(latents: Latents) -> Iterator[Tensor]:
    """The forms in which pipelines hand on latents, float32: as they are, spatial, and raw."""
    exact = latents.to(torch.float32)
    yield exact.tensor
    spatial = exact.spatial()
    yield spatial.tensor
    try:
        yield spatial.raw().tensor
    except LatentsError:
        return  # a space without the numbers for it


def same(tensor: Tensor, other: Tensor, coarsest: torch.dtype) -> bool:
    """Whether every image is the same in both but for rounding in a dtype. False with NaN."""
    if tensor.numel() != other.numel() or len(tensor) != len(other):
        return False
    a, b = tensor.detach().float().flatten(1), other.detach().float().flatten(1).to(tensor.device)
    # Unscaling takes up to three roundings, of half an eps each.
    allowed = max(2 * torch.finfo(coarsest).eps, 1e-5) * b.abs().amax(1).clamp_min(1e-3)
    return bool(((a - b).abs().amax(1) <= allowed).all())
