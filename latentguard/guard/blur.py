"""The blur of a blocked image: its colors on a grid so coarse that nothing in it is recognized."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from latentguard.errors import GuardError, LatentsError
from latentguard.spaces import Latents, LatentSpace
from latentguard.spaces.preview import linear_rgb

CELLS = 4
"""Cells along the longer side of the grid. Of 500 photos the pixel teacher names the class of 0.2 %
at 4, which is chance, of 0.8 % at 8 and of 33 % at 32 (benchmarks/results/blur.md)."""

Grid = NDArray[np.uint8]


@torch.no_grad()
def coarse(latents: Latents) -> Grid:
    """The mean colors of latents on a grid: uint8 [B, h, w, 3], the longer side at most `CELLS`.

    Of the linear RGB view, so that nothing is decoded. Raises LatentsError for a space without one.
    """
    return means(linear_rgb(latents))


def means(rgb: Tensor) -> Grid:
    """Those of pictures [B, 3, H, W] of about [-1, 1]."""
    size = tuple(rgb.shape[-2:])
    rows, columns = (max(1, round(CELLS * side / max(size))) for side in size)
    grid = F.adaptive_avg_pool2d(rgb.float(), (min(rows, size[0]), min(columns, size[1])))
    pixels = ((grid + 1) * 127.5).nan_to_num(0.0).clamp(0, 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def enlarged(grid: Grid, height: int, width: int) -> Grid:
    """One grid [h, w, 3] as a smooth picture, uint8 [height, width, 3]: nothing else is in it."""
    given = torch.from_numpy(grid).permute(2, 0, 1)[None].float()
    smooth = F.interpolate(given, (height, width), mode="bicubic", align_corners=False)
    pixels = smooth[0].clamp(0, 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def check_blurs(space: LatentSpace, name: str) -> None:
    """Raises GuardError for latents that nothing shows undecoded; name: of the pipeline."""
    try:
        coarse(Latents(torch.zeros(1, space.channels, 2, 2), space, scaled=True))
    except LatentsError as error:
        raise GuardError(
            f"on_block: blur cannot be had with this {name}: {error}; use on_block: blank or "
            "placeholder"
        ) from error


def painted(picture: Grid, like: Any) -> Any:
    """A picture in the form of `like`, which is one image; its size has to be that of `like`.

    picture: uint8 [H, W, 3]. like: a PIL image, or an array or tensor [H, W, C] or [C, H, W] of
        floats in [0, 1] or of uint8, C of 1, 3 or 4. None for an image of another form.
    """
    from PIL import Image

    if isinstance(like, Image.Image):
        return Image.fromarray(picture).convert(like.mode)
    if not isinstance(like, Tensor | np.ndarray) or like.ndim != 3:
        return None
    last = channels_last(like)
    if last is None:
        return None
    colors = _with_channels(picture, like.shape[-1 if last else 0])
    colors = colors if last else colors.transpose(2, 0, 1)
    tensor = torch.from_numpy(colors.copy())
    own = like if isinstance(like, Tensor) else torch.from_numpy(like[:0])
    if own.is_floating_point():
        tensor = (tensor.float() / 255).to(own.dtype)
    elif own.dtype != torch.uint8:
        return None
    return tensor.to(own.device) if isinstance(like, Tensor) else tensor.numpy()


def size_of(like: Any) -> tuple[int, int] | None:
    """Height and width in pixels of an image that `painted` knows the form of."""
    from PIL import Image

    if isinstance(like, Image.Image):
        return like.height, like.width
    if not isinstance(like, Tensor | np.ndarray) or like.ndim != 3:
        return None
    last = channels_last(like)
    if last is None:
        return None
    height, width = like.shape[:2] if last else like.shape[1:]
    return int(height), int(width)


def channels_last(like: Any) -> bool | None:
    """Whether an image's channels are its last axis, or its first; None where neither is known."""
    # Arrays of diffusers are [H, W, C] and its tensors [C, H, W]; that one is asked about first.
    order = (0, -1) if isinstance(like, Tensor) else (-1, 0)
    return next((axis == -1 for axis in order if like.shape[axis] in (1, 3, 4)), None)


def _with_channels(picture: Grid, channels: int) -> Grid:
    if channels == 1:
        gray: Grid = (picture @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)[..., None]
        return gray
    if channels == 4:
        return np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=-1)
    return picture
