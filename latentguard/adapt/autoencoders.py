"""What turns training images into latents: TAE encoders by file, diffusers VAEs by folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentguard.errors import ModelError
from latentguard.spaces import SPACES, Latents, LatentSpace


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class _Block(nn.Module):
    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )
        self.pool = (
            nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        y: Tensor = self.conv(x)
        return torch.relu(x + y)


def tae_encoder(channels: int, width: int = 64, pooled: bool = True) -> nn.Sequential:
    """The encoder of the tiny autoencoders of madebyollin/taesd (MIT): RGB in [0, 1] -> latents.

    channels: 4 (TAESD, TAESDXL), 16 (TAESD3, TAEF1) or 32 (TAEF2, whose last blocks are `pooled`).
    """
    layers: list[nn.Module] = [_conv(3, width), _Block(width, False)]
    for stage in range(3):
        layers.append(_conv(width, width, 2, bias=False))
        layers += [_Block(width, pooled and stage == 2) for _ in range(3)]
    return nn.Sequential(*layers, _conv(width, channels))


class Autoencoder:
    """Images to latents of one space.

    name: for model cards. space: the latents' space. scaled: their convention.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], name: str, space: LatentSpace, scaled: bool
    ) -> None:
        self._encode = encode
        self.name = name
        self.space = space
        self.scaled = scaled

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Latents:
        """RGB [B, 3, H, W] in [0, 1], H and W multiples of 8 -> Latents [B, C, H/8, W/8]."""
        x = images.contiguous(memory_format=torch.channels_last)
        return Latents(self._encode(x).contiguous(), self.space, self.scaled)


# The tiny autoencoders' own scale is the scaled one; 4 and 16 channels fit two spaces each.
_TAE_SPACES = {32: "flux2"}


def load_autoencoder(
    path: str | Path, space: str | Path | LatentSpace | None = None
) -> Autoencoder:
    """An autoencoder from a tiny encoder's .pth/.safetensors file or a diffusers VAE folder.

    Args:
        path: `taef2_encoder.pth` and its relatives, or a folder with diffusers' config.json.
        space: needed where the file fits several (4 channels: sdxl or sd1; 16: sd3 or flux1).
            A file or a LatentSpace of one's own will do.

    Raises:
        ModelError: nothing readable there, or the space is not certain.
    """
    source = Path(path)
    if source.is_dir():
        return _diffusers(source, space)
    if not source.is_file():
        raise ModelError(
            f"no autoencoder at {source}: give an encoder file of madebyollin/taesd or a "
            "folder that diffusers' AutoencoderKL.save_pretrained wrote"
        )
    try:
        if source.suffix == ".safetensors":
            import safetensors.torch

            state = safetensors.torch.load_file(str(source))
        else:
            state = torch.load(source, weights_only=True, map_location="cpu")
        channels = int(state[max(state, key=lambda key: int(key.split(".")[0]))].shape[0])
        net = tae_encoder(channels, pooled=any(".pool." in key for key in state))
        net.load_state_dict({key: value.float() for key, value in state.items()})
    except Exception as error:
        raise ModelError(
            f"{source}: not an encoder of madebyollin/taesd ({type(error).__name__}: {error})"
        ) from error
    name = space or _TAE_SPACES.get(channels)
    if name is None:
        fits = ", ".join(s.name for s in SPACES.values() if s.channels == channels)
        raise ModelError(f"{source}: {channels} channels fit {fits or 'no space'}; say which space")
    net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return Autoencoder(net, source.name, LatentSpace.of(name), scaled=True)


def _space_of(vae: Any) -> LatentSpace:
    return LatentSpace.from_vae_config(vae.config, [cls.__name__ for cls in type(vae).__mro__])


def _diffusers(folder: Path, space: str | Path | LatentSpace | None) -> Autoencoder:
    from diffusers import AutoencoderKL

    try:
        load: Any = AutoencoderKL.from_pretrained
        vae = load(str(folder), local_files_only=True).eval()
        found = LatentSpace.of(space) if space else _space_of(vae)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a readable diffusers autoencoder ({error})") from error
    vae.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def encode(images: Tensor) -> Tensor:
        latents: Tensor = vae.encode(images * 2 - 1).latent_dist.sample(generator)
        return latents

    return Autoencoder(encode, folder.name, found, scaled=False)
