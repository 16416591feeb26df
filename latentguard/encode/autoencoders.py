"""Autoencoders that turn pictures into latents: tiny encoders by file, diffusers' VAEs by folder or
name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from latentguard import regular
from latentguard.encode.diffusers_vae import (
    DiffusersVae,
    digest,
    hub_folder,
    is_hub_name,
    tiny_space,
)
from latentguard.encode.distribution import Distribution
from latentguard.encode.tiny import load_tiny
from latentguard.errors import ModelError
from latentguard.spaces import Latents, LatentSpace

Dtype = Literal["float32", "bfloat16", "float16"]


class Autoencoder:
    """Pictures to latents of one space.

    Attributes:
        name: for model cards. sha256: of its weights and configuration.
        space: the latents' space, with the autoencoder's own numbers where it has some.
        scaled: the convention in which it encodes.
        samples: whether latents can be drawn from a distribution. If not, there is only a mean.
        device, dtype: where and in which precision it computes. Half precision is autocast:
            operations that need more keep float32, and so do the latents.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Distribution],
        name: str,
        space: LatentSpace,
        scaled: bool,
        *,
        sha256: str = "",
        samples: bool = False,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
    ) -> None:
        self._encode = encode
        self.name = name
        self.sha256 = sha256
        self.space = space
        self.scaled = scaled
        self.samples = samples
        self.device = torch.device(device)
        self.dtype = dtype

    @property
    def multiple(self) -> int:
        """Pixels that width and height of a picture must be a multiple of."""
        return self.space.vae_scale_factor * self.space.packed_patch

    @torch.inference_mode()
    def encode(self, images: Tensor, seeds: Sequence[int] | None = None) -> Latents:
        """RGB [B, 3, H, W] in [0, 1] -> float32 Latents [B, C, H/factor, W/factor].

        H and W are multiples of the space's `vae_scale_factor`. seeds: one for each picture, by
        which latents are drawn; without them, they are the mean.
        """
        x = images.to(self.device).contiguous(memory_format=torch.channels_last)
        half = self.dtype != "float32"
        with torch.autocast(self.device.type, getattr(torch, self.dtype), enabled=half):
            found = self._encode(x)
        found = Distribution(found.mean.float(), None if found.std is None else found.std.float())
        latents = found.mean if seeds is None else found.sample(seeds)
        return Latents(latents.contiguous(), self.space, self.scaled)


def load_autoencoder(
    source: str | Path,
    space: str | Path | LatentSpace | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: Dtype = "float32",
    download: bool = False,
) -> Autoencoder:
    """An autoencoder from a tiny encoder's file, a diffusers folder or a name on the hub.

    Args:
        source: `taef2_encoder.pth` and its relatives; a folder of a diffusers VAE, or of a
            pipeline that has one; or OWNER/NAME of either.
        space: needed if the weights fit several spaces (tiny ones of 4 channels: sdxl or sd1; of
            16: sd3, flux1 and others). A file or a LatentSpace of your own works, too.
        device: None is CUDA if there is a GPU, and else the CPU.
        download: whether a name on the hub may be downloaded. If not, it must be on this machine.

    Raises:
        ModelError: nothing readable there, or the space is not certain.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    given = None if space is None else LatentSpace.of(space)
    path = Path(source).expanduser()
    if path.is_file():
        return _tiny(path, given, place, dtype)
    name = str(source)
    if path.is_dir():
        found = DiffusersVae(path, given)
        # A pipeline's VAE is in its `vae`, which is no name.
        name = path.resolve().name
    elif is_hub_name(name):
        found = DiffusersVae(hub_folder(name, download), given)
    else:
        raise ModelError(
            f"no autoencoder at {source}: give an encoder file of madebyollin/taesd, a folder that "
            "diffusers' save_pretrained wrote, or OWNER/NAME of the Hugging Face hub"
        )
    found.vae.to(place)
    with torch.inference_mode():
        samples = found.probe()
    return Autoencoder(
        found,
        name,
        found.space,
        found.scaled,
        sha256=digest(found.folder),
        samples=samples,
        device=place,
        dtype=dtype,
    )


def _tiny(path: Path, given: LatentSpace | None, device: torch.device, dtype: Dtype) -> Autoencoder:
    net, channels = load_tiny(path)
    net.to(device)
    with regular.open_regular(path) as file:
        sha256 = regular.sha256_of(file)
    return Autoencoder(
        lambda images: Distribution(net(images)),
        path.name,
        tiny_space(path, channels, given),
        scaled=True,
        sha256=sha256,
        device=device,
        dtype=dtype,
    )
