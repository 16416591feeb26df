"""What is wrong with a linear view: errors drawn anew for each batch, so that none can be learned.

A published linear view is right about color and layout and wrong about the rest: by the shares of
edges and texture that the encoder writes into the same numbers, by gain and color, by slow
gradients, by noise. `Errors` puts such errors on views of training pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Errors:
    """How large the errors are that views get, in a range of 1 (one deviation, or the largest).

    leak: what a random encoder writes into the view (see `leaked`), the largest of a batch.
    mixing, gain, bias: of colors. faded: share of pictures that lose one direction of color.
    sharper: logarithm of how much stronger an octave gets, the largest; it gets weaker by a third
        of that at most.
    slow: of a gradient over the picture. noise: white, the largest.
    moved: share of pictures that get the measured error of another picture.
    blurred: share of pictures that are blurred.
    """

    leak: float = 0.24
    mixing: float = 0.08
    gain: float = 0.25
    bias: float = 0.06
    faded: float = 0.25
    sharper: float = 1.2
    slow: float = 0.08
    noise: float = 0.08
    moved: float = 0.4
    blurred: float = 0.25

    def on(self, views: Tensor, perfect: Tensor, pictures: Tensor) -> Tensor:
        """Views [B, 3, s, s] of pictures [B, 3, P, P], P a multiple of s, with errors put on.

        perfect: the pictures averaged down to the views' size; the views' measured errors are
        their differences from it. All in [0, 1].
        """
        count = len(views)
        measured = views - perfect
        moved = torch.rand(count, 1, 1, 1) < self.moved
        others = measured[torch.randperm(count)] * torch.empty(count, 1, 1, 1).uniform_(0.6, 1.4)
        views = torch.where(moved, perfect + others, views)
        # Views with a measured error of their own get less of the drawn one.
        share = 0.4 if bool(measured.abs().mean() > 0.01) else 1.0
        level = share * self.leak * torch.rand(count, 1, 1, 1)
        views = views + level * leaked(pictures, views.shape[-1])
        views = self._sharpened(self._colored(views))
        slow = torch.randn(count, 3, 3, 3) * self.slow * torch.rand(count, 1, 1, 1)
        views = views + F.interpolate(
            slow, size=views.shape[-2:], mode="bicubic", align_corners=False
        )
        blurred = F.avg_pool2d(F.pad(views, (1, 1, 1, 1), mode="replicate"), 3, 1)
        views = torch.where(torch.rand(count, 1, 1, 1) < self.blurred, blurred, views)
        return views + self.noise * torch.rand(count, 1, 1, 1) * torch.randn_like(views)

    def _colored(self, views: Tensor) -> Tensor:
        count = len(views)
        mix = torch.eye(3) + self.mixing * torch.randn(count, 3, 3)
        lost = torch.randn(count, 3, 1)
        # A direction of color, not of brightness.
        lost = F.normalize(lost - lost.mean(1, keepdim=True), dim=1)
        share = (torch.rand(count, 1, 1) < self.faded) * torch.rand(count, 1, 1)
        mix = mix @ (torch.eye(3) - share * lost @ lost.transpose(1, 2))
        mix = mix * torch.exp(self.gain * (2 * torch.rand(count, 1, 1) - 1))
        bias = self.bias * torch.randn(count, 3, 1, 1)
        return torch.einsum("bchw,bcr->brhw", views - 0.5, mix) + 0.5 + bias

    def _sharpened(self, views: Tensor) -> Tensor:
        """Every octave of every picture stronger or weaker; the finest ones change most."""
        found: list[Tensor] = []
        for _ in range(3):
            coarser = F.avg_pool2d(views, 2)
            found.append(views - F.interpolate(coarser, size=views.shape[-2:], mode="bilinear"))
            views = coarser
        strength = self.sharper * torch.rand(len(views), 1, 1, 1)
        for number, octave in reversed(list(enumerate(found))):
            views = F.interpolate(views, size=octave.shape[-2:], mode="bilinear")
            most = strength * (1 - 0.3 * number)
            views = views + octave * torch.exp(most * (4 / 3 * torch.rand_like(most) - 1 / 3))
        return views


FILTERS = 16


def leaked(pictures: Tensor, cells: int) -> Tensor:
    """What random encoders write into a view beside the average, [B, 3, cells, cells].

    Random filters over twice a cell's extent, of random fineness, through random nonlinearities;
    every picture mixes them into three colors in its own way. Deviation about 1 over the batch.
    """
    count, _, size, _ = pictures.shape
    step = size // cells
    extent = 2 * step
    fineness = int(torch.randint(2, extent + 1, ()))
    filters = torch.randn(FILTERS, 3, fineness, fineness)
    # Brightness carries most of the detail.
    filters = filters * torch.rand(FILTERS, 1, 1, 1) + filters.mean(1, keepdim=True) * 1.5
    filters = F.interpolate(filters, size=(extent, extent), mode="bilinear", align_corners=False)
    filters = filters - filters.mean((2, 3), keepdim=True)
    padded = F.pad(pictures - 0.5, (step // 2,) * 4, mode="reflect")
    x = F.conv2d(padded, filters, stride=step)
    x = x / x.std((0, 2, 3), keepdim=True).clamp_min(1e-4)
    kinds = torch.randint(4, (FILTERS,))
    dark = F.avg_pool2d(pictures.mean(1, keepdim=True), step) * 2 - 1
    parts = (x, x.abs(), torch.tanh(2 * x), x * dark * 2)
    x = torch.stack([parts[int(kind)][:, i] for i, kind in enumerate(kinds)], 1)
    x = x - x.mean((0, 2, 3), keepdim=True)
    # Few filters at a time: an encoder has its habits.
    mix = torch.randn(count, FILTERS, 3) * (torch.rand(count, FILTERS, 1) < 0.3)
    mix = mix + 1.5 * mix.mean(2, keepdim=True)
    mix = mix / mix.norm(dim=1, keepdim=True).clamp_min(1e-4)
    x = torch.einsum("bfhw,bfr->brhw", x, mix)
    return x / x.std().clamp_min(1e-4)
