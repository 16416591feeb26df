"""Latents of our own small autoencoders for the crops of a cache, with the view fitted to each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from latentguard.adapt.cache import Cache
from latentguard.adapt.progress import Progress
from latentguard.adapt.small_autoencoders import (
    FACTOR,
    Design,
    LinearView,
    SmallAutoencoder,
    fit_view,
)
from latentguard.atomic import replacing

LARGE_SHARE = 4
"""One of so many pictures is encoded at the larger sizes too, which costs four times as much."""
FIT_ON = 200
"""Pictures that a view is fitted to."""
BATCH = 4


@dataclass(frozen=True)
class Encoded:
    """Some rows of a cache as one autoencoder's latents [n, C, cells, cells] of one size.

    view: fitted to latents of the smaller size, for both.
    """

    name: str
    cells: int
    rows: NDArray[np.intp]
    latents: NDArray[Any]
    view: LinearView

    def views(self, places: NDArray[np.intp], looseness: float = 0.0) -> Tensor:
        """Views [n, 3, cells, cells] in about [0, 1] of the rows at these places in `rows`.

        looseness: deviation of a random error of the factors, relative to their usual size, as
        factors have that were fitted to few or other pictures.
        """
        latents = torch.from_numpy(np.asarray(self.latents[places], dtype=np.float32))
        factors = torch.from_numpy(self.view.factors).float()
        if looseness:
            spread = latents.std((0, 2, 3)).clamp_min(1e-3)
            usual = (factors * spread[:, None]).square().mean().sqrt()
            factors = factors + looseness * usual / spread[:, None] * torch.randn_like(factors)
        centered = latents - latents.mean((0, 2, 3), keepdim=True)
        mean = torch.from_numpy(self.view.factors).float().T @ latents.mean((0, 2, 3))
        bias = torch.from_numpy(self.view.bias).float() + mean
        rgb = torch.einsum("bchw,cr->brhw", centered, factors) + bias.view(1, 3, 1, 1)
        return rgb * 0.5 + 0.5


def encode_all(
    folder: Path,
    cache: Cache,
    autoencoders: Sequence[tuple[Design, SmallAutoencoder]],
    sizes: Sequence[int],
) -> list[Encoded]:
    """Every autoencoder's latents of its share of the cache's crops; interrupted runs go on.

    sizes: cells per side; views are fitted to latents of the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (design, net) in enumerate(autoencoders):
        rows = np.arange(number, cache.meta.done, len(autoencoders))
        view: LinearView | None = None
        for cells in sizes:
            some = rows if cells == sizes[0] else rows[::LARGE_SHARE]
            path = folder / f"{design.name}-{cells}.npy"
            latents = _encode(path, cache, some, cells, design, net)
            view = view or _fit(cache, some, latents)
            found.append(Encoded(design.name, cells, some, latents, view))
    return found


def perfect_views(cache: Cache, rows: NDArray[np.intp], cells: int) -> tuple[Tensor, Tensor]:
    """The crops averaged down to a grid, [n, 3, cells, cells], and the crops, in [0, 1]."""
    crops = torch.from_numpy(cache.crops[rows]).permute(0, 3, 1, 2).float() / 255
    return F.avg_pool2d(crops, crops.shape[-1] // cells), crops


def _fit(cache: Cache, rows: NDArray[np.intp], latents: NDArray[Any]) -> LinearView:
    some = slice(0, FIT_ON)
    wanted, _ = perfect_views(cache, rows[some], latents.shape[-1])
    return fit_view(torch.from_numpy(np.asarray(latents[some], dtype=np.float32)), wanted)


def _encode(
    path: Path,
    cache: Cache,
    rows: NDArray[np.intp],
    cells: int,
    design: Design,
    net: SmallAutoencoder,
) -> NDArray[Any]:
    shape = (len(rows), design.channels, cells, cells)
    mark = path.with_suffix(".json")
    done = 0
    if path.exists() and mark.exists():
        state = json.loads(mark.read_text())
        done = state["done"] if state["shape"] == list(shape) else 0
    array = np.lib.format.open_memmap(path, "r+" if done else "w+", "f2", shape)
    title = f"encoding {cells * FACTOR} px with {design.name}"
    with Progress(title, len(rows), done) as progress:
        for start in range(done, len(rows), BATCH):
            part = rows[start : start + BATCH]
            array[start : start + BATCH] = _latents(net, cache, part, cells)
            if start % (32 * BATCH) == 0 or start + BATCH >= len(rows):
                array.flush()
                with replacing(mark) as file:
                    state = {"done": min(start + BATCH, len(rows)), "shape": list(shape)}
                    file.write(json.dumps(state).encode())
            progress.advance(len(part))
    encoded: NDArray[Any] = array
    return encoded


@torch.inference_mode()
def _latents(
    net: SmallAutoencoder, cache: Cache, rows: NDArray[np.intp], cells: int
) -> NDArray[Any]:
    crops = torch.from_numpy(cache.crops[rows]).permute(0, 3, 1, 2).float() / 255
    size = cells * FACTOR
    parts = []
    for one in crops:
        large = F.interpolate(one[None], size=(size, size), mode="bicubic").clamp(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(net.encode(large.contiguous(memory_format=torch.channels_last)).float())
    latents: NDArray[Any] = torch.cat(parts).numpy()
    return latents
