"""What a diffusers pipeline's `latents` are: their space, their scaling, their layout."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentguard.errors import LatentsError
from latentguard.spaces import BatchNorm, Latents, LatentSpace


def space_of(pipe: Any, given: LatentSpace | str | None = None) -> LatentSpace:
    """The latent space of a pipeline: what its VAE says, with the VAE's own numbers, or `given`.

    Raises LatentsError, naming the pipeline, where it cannot be known, and where `given` is another
    than the VAE's or is scaled in another way.
    """
    vae = getattr(pipe, "vae", None)
    name = type(pipe).__name__
    config = getattr(vae, "config", None)
    told: LatentSpace | LatentsError | None = None
    if config is not None and not is_tiny(vae):
        try:
            told = LatentSpace.from_vae_config(config, classes_of(vae))
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


def classes_of(vae: Any) -> list[str]:
    """The names of a VAE's class and of its parents, by which some spaces are told."""
    return [cls.__name__ for cls in type(vae).__mro__]


def is_tiny(vae: Any) -> bool:
    """Whether a VAE is an AutoencoderTiny, which decodes several spaces."""
    return type(vae).__name__ == "AutoencoderTiny" or "latent_magnitude" in vae.config


def _complete(space: LatentSpace, vae: Any) -> LatentSpace:
    """FLUX.2's statistics are buffers of its VAE."""
    if space.name != "flux2" or space.scale is not None or not hasattr(vae, "bn"):
        return space
    return space.with_batch_norm(*BatchNorm.from_vae(vae))


def _by_class(pipe: Any) -> LatentSpace:
    # An AutoencoderTiny does not say whose latents it decodes; the pipeline's class does.
    for cls in type(pipe).__mro__:
        space = LatentSpace.of_pipeline(cls.__name__)
        if space is not None:
            return space
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
        raise LatentsError(
            f"packed latents {list(tensor.shape)} cannot be read: the pipeline gave no size for "
            "them, or is not known to pack them as its space does"
        )
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


def packs(pipe: Any, space: LatentSpace) -> bool:
    """Whether a pipeline packs latents into tokens just as its space does.

    Its own functions are tried on numbers that are all different; where it has none, whatever it
    does is not known.
    """
    if space.packed_patch == 1 or not hasattr(type(pipe), "_pack_latents"):
        return False
    rows, columns = 2 * space.packed_patch, 3 * space.packed_patch
    probe = torch.arange(float(space.channels * rows * columns))
    probe = probe.view(1, space.channels, rows, columns)
    try:
        return _packs_like(pipe, space, probe) and _unpacks_like(pipe, space, probe)
    except Exception:  # of functions that want or give something else
        return False


def _packs_like(pipe: Any, space: LatentSpace, probe: Tensor) -> bool:
    given = {
        "latents": probe,
        "batch_size": 1,
        "num_channels_latents": space.channels,
        "height": probe.shape[2],
        "width": probe.shape[3],
    }
    names = list(inspect.signature(pipe._pack_latents).parameters)
    if names == ["latents"]:  # FLUX.2's, which get patches
        given["latents"] = pipe._patchify_latents(probe)
    return torch.equal(pipe._pack_latents(**{n: given[n] for n in names}), space.to_packed(probe))


def _unpacks_like(pipe: Any, space: LatentSpace, probe: Tensor) -> bool:
    tokens = space.to_packed(probe)
    if hasattr(type(pipe), "_unpack_latents"):
        factor = int(pipe.vae_scale_factor)
        size = (probe.shape[2] * factor, probe.shape[3] * factor)
        return torch.equal(pipe._unpack_latents(tokens, *size, factor), probe)
    return torch.equal(pipe._unpatchify_latents(space.patchify(probe)), probe)


def _packing(space: LatentSpace) -> str:
    if space.packed_patch == 1:
        return "not at all"
    return "tokens in rows, channel c*4 + dy*2 + dx"


def check_layout(pipe: Any, space: LatentSpace) -> None:
    """Raises LatentsError for a pipeline whose latents are not known to be read rightly.

    Those that denoise views one by one; those of packed spaces which neither pack as their space
    does nor prepare latents of a height and width.
    """
    name = type(pipe).__name__
    instead = "use output_type='latent' and Scorer with latents whose layout you know"
    if hasattr(type(pipe), "get_views"):
        raise LatentsError(
            f"{name} denoises its latents in overlapping views, and no step shows a whole image, "
            f"so it cannot be guarded while it denoises: {instead}"
        )
    if packs(pipe, space):
        return
    prepare = getattr(type(pipe), "prepare_latents", None)
    sized = prepare is not None and {"height", "width"} <= set(
        inspect.signature(prepare).parameters
    )
    sized = sized or space.packed_patch == 1  # all that such a space has is spatial
    if hasattr(type(pipe), "_pack_latents") or not sized:
        raise LatentsError(
            f"{name} is not known to pack its latents as space {space} does "
            f"({_packing(space)}; told by its _pack_latents and _unpack_latents), so what they "
            f"show cannot be read while it denoises: {instead}"
        )
