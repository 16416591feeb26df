"""How latents of a picture become those of the picture at half its size: one linear map, fitted.

Autoencoders are convolutional, so the map at 256 px is the map at 512 and 1024 px. The mean of four
cells is far from it, as a cell's channels hold what is fine in it (docs/nano.md has the figures).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentguard.adapt.cache import Cache, training_latents
from latentguard.adapt.progress import Progress
from latentguard.atomic import replacing
from latentguard.encode.autoencoders import Autoencoder
from latentguard.encoders.nano_net import KERNEL

CROPS = 480
RIDGE = 10.0
"""Added to the squares, which are sums over tens of thousands of cells."""
BATCH = 8


def halving(cache: Cache, encoder: Autoencoder) -> tuple[Tensor, Tensor]:
    """Weight [C, C, 6, 6] and bias [C] of the convolution of stride 2 that halves latents.

    Fitted to the first crops of the cache; kept in its folder.
    """
    kept = cache.folder / "halving.npy"
    if kept.exists():
        found = torch.from_numpy(np.load(kept, allow_pickle=False))
        return _weight(found), found[-1]
    count = min(CROPS, cache.meta.done)
    squares, products = None, None
    with Progress("fitting latents at half the size", count) as progress:
        for first in range(0, count, BATCH):
            rows = np.arange(first, min(first + BATCH, count))
            crops = torch.from_numpy(cache.crops[rows]).permute(0, 3, 1, 2).float() / 255
            half = F.interpolate(crops, scale_factor=0.5, mode="bilinear", antialias=True)
            halved = training_latents(encoder, half, int(first))
            wanted = halved.float().flatten(2).transpose(1, 2).flatten(0, 1)
            seen = _seen(cache.batch("latents", rows))
            squares = _plus(squares, seen.T @ seen)
            products = _plus(products, seen.T @ wanted.double())
            progress.advance(len(rows))
    assert squares is not None
    assert products is not None
    solved = torch.linalg.solve(squares + RIDGE * torch.eye(len(squares)), products).float()
    with replacing(Path(kept)) as file:
        np.save(file, solved.numpy())
    return _weight(solved), solved[-1]


def set_halving(net: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give an adapter's network the map that was fitted."""
    halve = net.get_submodule("adapter.halve")
    assert isinstance(halve, nn.Conv2d)
    assert halve.bias is not None
    with torch.no_grad():
        halve.weight.copy_(weight)
        halve.bias.copy_(bias)


def _seen(latents: Tensor) -> Tensor:
    """What each cell at half the size is computed from, and a one: float64 [cells, C * 36 + 1]."""
    pad = (KERNEL - 2) // 2
    padded = F.pad(latents, (pad, pad, pad, pad), mode="replicate")
    seen = F.unfold(padded, KERNEL, stride=2).transpose(1, 2).flatten(0, 1)
    return torch.cat([seen, torch.ones(len(seen), 1)], 1).double()


def _weight(solved: Tensor) -> Tensor:
    channels = solved.shape[1]
    return solved[:-1].T.reshape(channels, channels, KERNEL, KERNEL).contiguous()


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
