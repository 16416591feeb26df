"""Encoders of the tiny autoencoders of madebyollin/taesd (MIT), from files of their weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from latentguard.errors import ModelError


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
    """RGB in [0, 1] -> latents [B, channels, H/8, W/8], in the scaled convention.

    channels: 4 (TAESD, TAESDXL), 16 (TAESD3, TAEF1) or 32 (TAEF2, whose last blocks are `pooled`).
    """
    layers: list[nn.Module] = [_conv(3, width), _Block(width, False)]
    for stage in range(3):
        layers.append(_conv(width, width, 2, bias=False))
        layers += [_Block(width, pooled and stage == 2) for _ in range(3)]
    return nn.Sequential(*layers, _conv(width, channels))


# How files name the layers: taesd's own, and those of diffusers' AutoencoderTiny.
_PREFIXES = ("encoder.layers.", "encoder.", "layers.")


def load_tiny(path: Path) -> tuple[nn.Sequential, int]:
    """The encoder in a .pth or .safetensors file, and how many channels its latents have.

    A file of the whole autoencoder will do. Nothing is unpickled but tensors.
    Raises ModelError for a file of something else.
    """
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            state = safetensors.torch.load_file(str(path))
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
        prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), "")
        layers = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
        channels = int(layers[max(layers, key=lambda key: int(key.split(".")[0]))].shape[0])
        net = tae_encoder(channels, pooled=any(".pool." in key for key in layers))
        net.load_state_dict({key: value.float() for key, value in layers.items()})
    except Exception as error:
        raise ModelError(
            f"{path}: not an encoder of madebyollin/taesd ({type(error).__name__}: {error})"
        ) from error
    net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return net, channels
