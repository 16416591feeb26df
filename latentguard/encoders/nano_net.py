"""The network of the nano encoders: a latent adapter in front of EfficientNet-Lite2's trunk.

The adapter maps a latent grid to what the pixel network computes at 1/8 resolution of a 256 px
image, so that everything after it can stay what ImageNet made it. (Network stitching: Lenc and
Vedaldi 2015, arXiv 1411.5908; training in latentguard.adapt.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentguard.encoders.lite import ENTRY_CHANNELS, ConvBN, Lite2, LiteStem, LiteTrunk
from latentguard.encoders.nano_sizes import COARSE, GRID, OCTAVES, SMALLEST, VIEW


class ResidualBlock(nn.Module):
    """x + conv1x1(relu6(bn(conv3x3(x)))): dense convolutions, which CPUs run near their peak."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.spatial = ConvBN(width, hidden, 3)
        self.project = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.spatial(x))
        return x + y


KERNEL = 6
"""Cells per side that a halving looks at."""


class LatentAdapter(nn.Module):
    """Latents [B, C, h, w] -> features [B, 48, ~32, ~32].

    `small` reads a grid of about 32 x 32 cells (256 px). Larger grids are halved first, once or
    more, by a linear map that was fitted to give the latents of the picture at half its size
    (adapt/halving.py): the mean of four cells is not that. Models made without one (`halving` 0)
    have a second entry, `large`, which reads 64 x 64 cells with stride 2, and average what is
    larger down to it.
    """

    def __init__(
        self,
        channels: int,
        width: int = 96,
        hidden: int = 128,
        depth: int = 4,
        halving: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.small = ConvBN(channels, width, 3)
        self.halve: nn.Conv2d | None = None
        if halving:
            pad = (halving - 2) // 2
            self.halve = nn.Conv2d(
                channels, channels, halving, 2, padding=pad, padding_mode="replicate"
            )
            self.halve.requires_grad_(False)
        else:
            self.large = ConvBN(channels, width, 4, 2)
        self.blocks = nn.Sequential(*(ResidualBlock(width, hidden) for _ in range(depth)))
        self.out = nn.Conv2d(width, ENTRY_CHANNELS, 1)

    mean: Tensor
    std: Tensor

    def forward(self, latents: Tensor) -> Tensor:
        x = latents
        if self.halve is not None:
            while _is_big(x) and min(x.shape[-2:]) >= SMALLEST:
                x = self.halve(x)
        x = (x - self.mean) / self.std
        big = self.halve is None and _is_big(x)
        target = 2 * GRID if big else GRID
        ratio = target / _cells(x)
        if not 0.75 < ratio < 1.34:
            size = tuple(max(4, round(n * ratio / 4) * 4) for n in x.shape[-2:])
            # In float32, as not every device has this in bfloat16.
            shrunk = F.interpolate(x.float(), size=size, mode="bilinear", antialias=ratio < 1)
            x = shrunk.to(x.dtype)
        return self.read(x, big)

    def read(self, x: Tensor, big: bool = False) -> Tensor:
        """Features of a grid that has its size and its mean already."""
        y: Tensor = self.out(self.blocks(self.large(x) if big else self.small(x)))
        return y


def _cells(x: Tensor) -> float:
    """Per side, of a square as large."""
    cells: float = (x.shape[-2] * x.shape[-1]) ** 0.5
    return cells


def _is_big(x: Tensor) -> bool:
    """Whether a grid is nearer to 64 x 64 cells than to 32 x 32, by their geometric middle."""
    return _cells(x) > GRID * 2**0.5


class NanoNet(nn.Module):
    """Adapter and trunk: latents [B, C, h, w] (scaled convention) -> class logits [B, 1000]."""

    crop_side: int | None = GRID

    def __init__(self, channels: int, **sizes: int) -> None:
        """sizes: width, hidden, depth and halving of the `LatentAdapter`."""
        super().__init__()
        self.adapter = LatentAdapter(channels, **sizes)
        self.trunk = LiteTrunk()

    def forward(self, latents: Tensor) -> Tensor:
        y: Tensor = self.trunk(self.adapter(latents))
        return y

    def feature_map(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> [B, 1280, ~8, ~8] before pooling."""
        return self.trunk.feature_map(self.adapter(latents))

    def read(self, grid: Tensor) -> Tensor:
        """The same of a grid that the adapter has brought to its size."""
        return self.trunk.feature_map(self.adapter.read(grid))


def leveled(view: Tensor, octaves: int = len(OCTAVES)) -> Tensor:
    """A view [B, 3, h, w] with its octaves as strong as they are in pictures.

    Linear views of latents overstate what is fine: an autoencoder writes edges larger than they
    are. Each octave of each image (of a Laplacian pyramid) is multiplied by one number, most of the
    way to the usual strength, and hardly raised, as pictures may be blurred.
    """
    found: list[Tensor] = []
    for _ in range(octaves):
        if min(view.shape[-2:]) < 2:
            break
        coarser = F.avg_pool2d(view, 2)
        found.append(view - _as_large(coarser, view))
        view = coarser
    mean = view.mean((1, 2, 3), keepdim=True)
    view = (view - mean) * _gain(view - mean, COARSE, 0.3, (0.7, 1.5)) + mean
    for octave, usual in zip(reversed(found), reversed(OCTAVES[: len(found)]), strict=True):
        view = octave * _gain(octave, usual, 0.8, (0.3, 1.3)) + _as_large(view, octave)
    return view


def _as_large(coarser: Tensor, finer: Tensor) -> Tensor:
    size = finer.shape[-2:]
    return F.interpolate(coarser, size=size, mode="bilinear", align_corners=False)


def _gain(octave: Tensor, usual: float, power: float, bounds: tuple[float, float]) -> Tensor:
    deviation = octave.square().mean((1, 2, 3), keepdim=True).add(1e-6).sqrt()
    return ((usual / deviation) ** power).clamp(*bounds)


class RgbViewNet(nn.Module):
    """The whole classifier behind the linear RGB view of a latent (3 numbers a cell).

    Reads only what the published view makes certain, so that no autoencoder is needed to train
    it. size: pixels per side that the view is resized to before the stem. octaves: how many of the
    view's finest octaves are brought to the strength that they have in pictures (see `leveled`); 0
    is none.
    """

    crop_side: int | None = None
    """A crop of a view is a picture of very few pixels; what it shows was not measured."""

    def __init__(
        self, factors: list[list[float]], bias: list[float], size: int, octaves: int = 0
    ) -> None:
        super().__init__()
        self.register_buffer("factors", torch.tensor(factors))
        self.register_buffer("bias", torch.tensor(bias))
        self.size = size
        self.octaves = octaves
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
        if self.octaves:
            rgb = leveled(rgb.clamp(*VIEW), self.octaves)
        ratio = self.size / (rgb.shape[-2] * rgb.shape[-1]) ** 0.5
        size = tuple(max(32, round(n * ratio / 32) * 32) for n in rgb.shape[-2:])
        if size != tuple(rgb.shape[-2:]):
            rgb = F.interpolate(rgb, size=size, mode="bicubic", antialias=ratio < 1)
        return self.read(rgb)

    def read(self, rgb: Tensor) -> Tensor:
        """The same of a view that has its size already."""
        return self.trunk.feature_map(self.stem(Lite2.normalize(rgb.clamp(0, 1))))

    def feature_map(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> [B, 1280, ~size/32, ~size/32] before pooling."""
        return self.from_view(self.view(latents))

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> class logits [B, 1000]."""
        y: Tensor = self.trunk.classifier(self.feature_map(latents).mean((2, 3)))
        return y
