"""Examples of these tests: drawings as FLUX.2 latents, and real photos as nano-flux2 sees them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from latentguard.encoders import Encoder, load_encoder
from latentguard.files import save_latents
from latentguard.learn import Examples
from latentguard.learn.shipped import find_background
from latentguard.spaces import Latents, LatentSpace


@lru_cache(maxsize=1)
def nano() -> Encoder:
    return load_encoder("nano-flux2", "cpu")


def pictures_of(shape: str, count: int, seed: int) -> np.ndarray:
    """Crosses or disks of random size, place and color on random gradients, [count, 3, 32, 32] in
    about [-1, 1]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:32, 0:32] / 31
    found = []
    for _ in range(count):
        corner = rng.uniform(-0.5, 0.5, (3, 3))
        picture = corner[0, :, None, None] + corner[1, :, None, None] * rows
        picture = picture + corner[2, :, None, None] * columns
        y, x = rng.uniform(0.35, 0.65, 2)
        size = rng.uniform(0.2, 0.3)
        if shape == "disk":
            inside = (rows - y) ** 2 + (columns - x) ** 2 < size**2
        else:
            inside = np.minimum(abs(rows - y), abs(columns - x)) < 0.06
        picture[:, inside] = rng.uniform(-1, 1, 3)[:, None]
        found.append(picture)
    return np.stack(found)


def of_rgb(rgb: torch.Tensor) -> torch.Tensor:
    """FLUX.2 latents [B, 32, h, w] whose linear view is a picture [B, 3, h, w] in [-1, 1]."""
    view = LatentSpace.get("flux2").rgb_view
    assert view is not None
    inverse = torch.linalg.pinv(torch.tensor(view.factors))
    return torch.einsum("brhw,rc->bchw", rgb - torch.tensor(view.bias).view(1, 3, 1, 1), inverse)


def drawings(shape: str, count: int, seed: int) -> Latents:
    """Latents of crosses or disks, 256 px, with a little noise."""
    latents = of_rgb(torch.tensor(pictures_of(shape, count, seed), dtype=torch.float32))
    noise = np.random.default_rng([seed, 1]).normal(size=latents.shape)
    return Latents(latents + 0.05 * torch.tensor(noise).float(), "flux2", scaled=True)


def drawn(folder: Path, shape: str, count: int, seed: int) -> Path:
    """A file of drawings."""
    path = folder / f"{shape}-{seed}.safetensors"
    save_latents(path, drawings(shape, count, seed))
    return path


def photos(part: str, rest: bool = False) -> Examples:
    """Photos of the package's background whose names begin so, or all others."""
    found = find_background(nano().name, nano().sha256, nano().space)
    index = [i for i, name in enumerate(found.names) if name.startswith(part) is not rest]
    names = tuple(found.names[i] for i in index)
    return Examples(found.rows[index], names, found.joint)
