"""What ComfyUI's latents mean: from a LATENT or a sampler's tensor to latentguard's Latents.

Between nodes ComfyUI holds latents as its VAE gives them (a LATENT). While it samples it holds them
as the model denoises them (`latent_format.process_in` of them). Most of its VAEs give latents that
are not scaled yet. FLUX.2's normalizes by itself, and `process_in` does nothing (`Held.scaled`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from latentguard import Latents, LatentsError, LatentSpace
from latentguard.spaces import recognize


@dataclass(frozen=True)
class Held:
    """How ComfyUI holds latents of a space.

    scaled: whether a LATENT is scaled already. layout: "patches" where a cell is a patch of 2x2.
    frames: whether there is an axis of frames, [B, C, 1, H, W].
    """

    space: str
    scaled: bool = False
    layout: Literal["spatial", "patches"] = "spatial"
    frames: bool = False


FORMATS = {
    "SD15": Held("sd1"),
    "SDXL": Held("sdxl"),
    "SDXL_Playground_2_5": Held("sdxl-playground25"),
    "SD3": Held("sd3"),
    "Flux": Held("flux1"),
    "Flux2": Held("flux2", scaled=True, layout="patches"),
    "Wan21": Held("wan21", frames=True),
    "Wan22": Held("wan22", frames=True),
    "HunyuanVideo": Held("hunyuan-video", frames=True),
    "HunyuanVideo15": Held("hunyuan-video-1.5", frames=True),
    "HunyuanImage21": Held("hunyuan-image-2.1"),
    "Mochi": Held("mochi", frames=True),
}
"""By the name of the class in comfy/latent_formats.py."""

BY_SPACE = {held.space: held for held in FORMATS.values()}
SPACE_CHOICES = ["auto", *BY_SPACE]
"""What the nodes offer as `space`."""

MAX_DEVIATION = 1e-3
"""How far a format's numbers may be from the space's, relative to the largest of them: published
factors are rounded differently."""


def held_by(latent_format: Any) -> Held:
    """How latents of a model's `latent_format` are held.

    Raises LatentsError for a format that is not known, and for one with other numbers than the
    space has: a wrong scaling would be judged as another picture.
    """
    name = type(latent_format).__name__
    held = FORMATS.get(name)
    if held is None:
        raise LatentsError(
            f"the model's latent format {name} is not known, so its latents cannot be judged: "
            f"known are {', '.join(FORMATS)}"
        )
    space = LatentSpace.get(held.space)
    channels = space.packed_channels if held.layout == "patches" else space.channels
    if latent_format.latent_channels != channels:
        raise LatentsError(
            f"the model's latent format {name} has {latent_format.latent_channels} channels, "
            f"space {held.space} {channels}"
        )
    shape = (1, channels, 1, 4, 4) if held.frames else (1, channels, 4, 4)
    probe = torch.linspace(-2.0, 2.0, channels * 16).reshape(shape)
    expected = probe if held.scaled else latents_of(probe, held).to_scaled().tensor.reshape(shape)
    found = latent_format.process_in(probe.clone())
    if not torch.allclose(
        found, expected, rtol=0, atol=MAX_DEVIATION * float(expected.abs().max())
    ):
        raise LatentsError(
            f"the model's latent format {name} scales latents otherwise than space {held.space}"
        )
    return held


def tensor_of(latent: Any) -> Tensor:
    """A copy of the numbers of a LATENT, which nobody else holds.

    Raises LatentsError where there is no plain tensor of floating point numbers.
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if type(samples) is not torch.Tensor or samples.layout != torch.strided:
        raise LatentsError(
            f"a LATENT must hold a tensor `samples`, got {type(samples).__name__}: nested and "
            "other latents cannot be judged"
        )
    return samples.detach().clone(memory_format=torch.contiguous_format)


def latents_of(tensor: Tensor, held: Held, scaled: bool | None = None) -> Latents:
    """Spatial latents of a tensor in ComfyUI's shape; `scaled` is that of a LATENT where it is not
    given. Raises LatentsError for another shape, and for more than one frame."""
    scaled = held.scaled if scaled is None else scaled
    return Latents(tensor, held.space, scaled, held.layout).to_spatial()


def tensor_like(latents: Latents, held: Held, like: Tensor) -> Tensor:
    """The numbers of spatial latents in the shape and dtype of the tensor that they came from."""
    tensor = latents.tensor
    if held.layout == "patches":
        tensor = latents.space.patchify(tensor)
    return tensor.reshape(like.shape).to(like)


def empty(tensor: Tensor) -> list[int]:
    """The images [B, C, ...] in which every channel has one value: what a sampler guard leaves of
    a blocked one, and what was never sampled."""
    flat = tensor.flatten(2)
    return (flat == flat[..., :1]).flatten(1).all(1).nonzero().flatten().tolist()


def read(latent: Any, space: str = "auto", model: Any = None) -> tuple[Latents, Tensor]:
    """The latents of a LATENT, and the tensor that they were read from, a copy of its own.

    Args:
        space: one of SPACE_CHOICES. With "auto" it is that of the model, else what the statistics
            say where they are certain.
        model: a MODEL, or None.

    Raises LatentsError where that leaves the space open, and for what is no image.
    """
    tensor = tensor_of(latent)
    if model is not None:
        held = held_by(model.get_model_object("latent_format"))
        if space not in ("auto", held.space):
            raise LatentsError(f"`space` says {space}, and the model denoises {held.space}")
    elif space == "auto":
        held = _recognized(tensor)
    elif space in BY_SPACE:
        held = BY_SPACE[space]
    else:
        raise LatentsError(
            f"`space` must be one of {', '.join(SPACE_CHOICES)}, got {space!r:.60}: how ComfyUI "
            "holds latents of another is not known"
        )
    return latents_of(tensor, held), tensor


def _recognized(tensor: Tensor) -> Held:
    if tensor.ndim != 4:
        raise LatentsError(
            f"`space` is auto, which reads images [B, C, H, W], got {list(tensor.shape)}: choose "
            "the space, or connect the model"
        )
    channels = tensor.shape[1]
    alike = [held for held in BY_SPACE.values() if _channels(held) == channels]
    found = {
        held.space
        for scaled in {held.scaled for held in alike}
        if (name := recognize(tensor, scaled=scaled).space) is not None
        for held in alike
        if held.space == name and held.scaled == scaled
    }
    if len(found) != 1:
        names = ", ".join(held.space for held in alike) or "none that is known"
        raise LatentsError(
            f"the space of these latents is not certain ({channels} channels: {names}): choose "
            "it in `space`, or connect the model"
        )
    return BY_SPACE[found.pop()]


def _channels(held: Held) -> int:
    space = LatentSpace.get(held.space)
    return space.packed_channels if held.layout == "patches" else space.channels
