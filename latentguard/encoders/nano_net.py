"""The network of the nano encoders: a latent adapter in front of EfficientNet-Lite2's trunk.

The adapter maps a latent grid to what the pixel network computes at 1/8 resolution of a 256 px
image, so that everything after it can stay what ImageNet made it. (Network stitching: Lenc and
Vedaldi 2015, arXiv 1411.5908; training in latentguard.adapt.)
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentguard.encoders.lite import ENTRY_CHANNELS, ConvBN, Lite2, LiteStem, LiteTrunk

GRID = 32
"""Cells per side at which the trunk was trained: 256 px at factor 8."""


class ResidualBlock(nn.Module):
    """x + conv1x1(relu6(bn(conv3x3(x)))): dense convolutions, which CPUs run near their peak."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.spatial = ConvBN(width, hidden, 3)
        self.project = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.spatial(x))
        return x + y


class LatentAdapter(nn.Module):
    """Latents [B, C, h, w] -> features [B, 48, ~32, ~32].

    Two entries share the blocks: `small` reads the grid as it is (256 px), `large` reads a grid of
    twice the size with stride 2 (512 px), where each cell shows finer detail. Larger grids are
    averaged down to the nearer of the two first.
    """

    def __init__(self, channels: int, width: int = 96, hidden: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.small = ConvBN(channels, width, 3)
        self.large = ConvBN(channels, width, 4, 2)
        self.blocks = nn.Sequential(*(ResidualBlock(width, hidden) for _ in range(depth)))
        self.out = nn.Conv2d(width, ENTRY_CHANNELS, 1)

    mean: Tensor
    std: Tensor

    def forward(self, latents: Tensor) -> Tensor:
        x = (latents - self.mean) / self.std
        cells = (x.shape[-2] * x.shape[-1]) ** 0.5
        # The geometric middle between the two trained sizes separates them.
        big = cells > GRID * 2**0.5
        target = 2 * GRID if big else GRID
        ratio = target / cells
        if not 0.75 < ratio < 1.34:
            size = tuple(max(4, round(n * ratio / 4) * 4) for n in x.shape[-2:])
            x = F.interpolate(x, size=size, mode="bilinear", antialias=ratio < 1)
        x = self.large(x) if big else self.small(x)
        y: Tensor = self.out(self.blocks(x))
        return y


class NanoNet(nn.Module):
    """Adapter and trunk: latents [B, C, h, w] (scaled convention) -> class logits [B, 1000]."""

    crop_side: int | None = GRID

    def __init__(self, channels: int, width: int = 96, hidden: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.adapter = LatentAdapter(channels, width, hidden, depth)
        self.trunk = LiteTrunk()

    def forward(self, latents: Tensor) -> Tensor:
        y: Tensor = self.trunk(self.adapter(latents))
        return y

    def feature_map(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> [B, 1280, ~8, ~8] before pooling."""
        return self.trunk.feature_map(self.adapter(latents))


class ViewFilter(nn.Module):
    """A small U-net that takes out of an RGB view what does not belong there.

    View [B, 3, h, w] in about [0, 1] -> the same shape. What a linear view gets wrong (texture that
    leaks into colors, gain, slow gradients) is much alike from one autoencoder to the next. It
    works on blocks of 2 x 2 cells, which costs a quarter, and starts as the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.enter = _filtering(12, width)
        self.down = nn.ModuleList(
            nn.Sequential(_filtering(a, b, 2), _filtering(b, b)) for a, b in pairwise(widths)
        )
        self.up = nn.ModuleList(_filtering(a + b, a) for a, b in pairwise(widths))
        self.out = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, view: Tensor) -> Tensor:
        height, width = view.shape[-2:]
        even = F.pad(view, (0, width % 2, 0, height % 2), mode="replicate")
        levels = [self.enter(F.pixel_unshuffle(even * 2 - 1, 2))]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up in reversed(self.up):
            finer = levels.pop()
            x = F.interpolate(x, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            x = up(torch.cat([finer, x], 1))
        change = F.pixel_shuffle(self.out(x), 2)
        return view + change[..., :height, :width]


def _filtering(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU(inplace=True))


class RgbViewNet(nn.Module):
    """The whole classifier behind the linear RGB view of a latent (3 numbers a cell).

    Reads only what the published view makes certain, so that no autoencoder is needed to train
    it. size: pixels per side that the view is resized to before the stem. filter_width: of the
    ViewFilter before that; 0 is none.
    """

    crop_side: int | None = None
    """A crop of a view is a picture of very few pixels; what it shows was not measured."""

    def __init__(
        self, factors: list[list[float]], bias: list[float], size: int, filter_width: int = 0
    ) -> None:
        super().__init__()
        self.register_buffer("factors", torch.tensor(factors))
        self.register_buffer("bias", torch.tensor(bias))
        self.size = size
        self.filter = ViewFilter(filter_width) if filter_width else None
        self.stem = LiteStem()
        self.trunk = LiteTrunk()

    factors: Tensor
    bias: Tensor

    def view(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> RGB [B, 3, h, w] in about [0, 1]."""
        rgb = torch.einsum("bchw,cr->brhw", latents, self.factors.to(latents.dtype))
        return (rgb + self.bias.to(latents.dtype).view(3, 1, 1)) * 0.5 + 0.5

    def from_view(self, rgb: Tensor) -> Tensor:
        """RGB view [B, 3, h, w] in [0, 1] -> [B, 1280, ~size/32, ~size/32]."""
        if self.filter is not None:
            rgb = self.filter(rgb)
        ratio = self.size / (rgb.shape[-2] * rgb.shape[-1]) ** 0.5
        size = tuple(max(32, round(n * ratio / 32) * 32) for n in rgb.shape[-2:])
        if size != tuple(rgb.shape[-2:]):
            rgb = F.interpolate(rgb, size=size, mode="bicubic", antialias=ratio < 1)
        x = Lite2.normalize(rgb.clamp(0, 1))
        return self.trunk.feature_map(self.stem(x))

    def feature_map(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> [B, 1280, ~size/32, ~size/32] before pooling."""
        return self.from_view(self.view(latents))

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> class logits [B, 1000]."""
        y: Tensor = self.trunk.classifier(self.feature_map(latents).mean((2, 3)))
        return y
