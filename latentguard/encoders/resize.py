"""Latents of any size for a transformer that was trained on one: three ways to adapt them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["interpolate", "pool", "tile"]


class Adapter(Protocol):
    """One way, made for one size of latents.

    tiles: views of each image; grid: patches (rows, columns) that its tokens stand for.
    """

    tiles: int
    grid: tuple[int, int]

    def __call__(self, tensor: Tensor) -> Tensor:
        """[B, C, H, W] to [B * tiles, C, h, w], linear in the values."""

    def stitch(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B * tiles, n, D] to [B, rows * columns, D]."""


class Interpolate:
    """As they are; only a side that is no multiple of the patch is continued by its edge.

    The positional embedding is interpolated to the grid by the transformer itself.
    """

    tiles = 1

    def __init__(self, height: int, width: int, side: int, patch: int) -> None:
        self.extent = (_up(height, patch), _up(width, patch))
        self.grid = (self.extent[0] // patch, self.extent[1] // patch)

    def __call__(self, tensor: Tensor) -> Tensor:
        return extend(tensor, *self.extent)

    def stitch(self, tokens: Tensor) -> Tensor:
        return tokens


class Pool:
    """Averaged to the trained grid, repeated where it is finer; the aspect ratio is not kept."""

    tiles = 1

    def __init__(self, height: int, width: int, side: int, patch: int) -> None:
        self.side = side
        self.grid = (side // patch, side // patch)

    def __call__(self, tensor: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(tensor, self.side)

    def stitch(self, tokens: Tensor) -> Tensor:
        return tokens


class Tile:
    """One pooled view of the whole, then views of the trained size that together cover it.

    Views start at multiples of the patch, spread evenly, overlapping where they must, so that
    their tokens lie on one grid. A side that is shorter than the trained one or no multiple of
    the patch is continued by its edge. Latents of the trained size are a single view.
    """

    def __init__(self, height: int, width: int, side: int, patch: int) -> None:
        self.side, self.patch = side, patch
        self.extent = (max(_up(height, patch), side), max(_up(width, patch), side))
        self.grid = (self.extent[0] // patch, self.extent[1] // patch)
        self.rows, self.columns = (_starts(n, side // patch) for n in self.grid)
        self.whole = (height, width) != (side, side)
        self.tiles = len(self.rows) * len(self.columns) + self.whole

    def __call__(self, tensor: Tensor) -> Tensor:
        if not self.whole:
            return tensor
        full, side, patch = extend(tensor, *self.extent), self.side, self.patch
        views = [F.adaptive_avg_pool2d(tensor, side)]
        for row in self.rows:
            for column in self.columns:
                y, x = row * patch, column * patch
                views.append(full[:, :, y : y + side, x : x + side])
        return torch.stack(views, dim=1).flatten(0, 1)

    def stitch(self, tokens: Tensor) -> Tensor:
        """Each place's token from the view whose center is nearest; the pooled view has none."""
        if not self.whole:
            return tokens
        per_side = self.side // self.patch
        height, width = self.grid
        row_view, row = _nearest(self.rows, height, per_side)
        column_view, column = _nearest(self.columns, width, per_side)
        view = torch.tensor(row_view)[:, None] * len(self.columns) + torch.tensor(column_view)
        place = torch.tensor(row)[:, None] * per_side + torch.tensor(column)
        index = (view * per_side**2 + place).flatten().to(tokens.device)
        local = tokens.reshape(-1, self.tiles, *tokens.shape[1:])[:, 1:].flatten(1, 2)
        return local.index_select(1, index)


ADAPTERS: dict[Resize, Callable[[int, int, int, int], Adapter]] = {
    "interpolate": Interpolate,
    "pool": Pool,
    "tile": Tile,
}


def extend(tensor: Tensor, height: int, width: int) -> Tensor:
    """Continue [..., h, w] downward and to the right by the last row and column."""
    h, w = tensor.shape[-2:]
    # An open size of an export says neither that it is smaller nor that it is not.
    if is_open(h) or h < height:
        rows = torch.arange(height, device=tensor.device).clamp(max=h - 1)
        tensor = tensor.index_select(-2, rows)
    if is_open(w) or w < width:
        columns = torch.arange(width, device=tensor.device).clamp(max=w - 1)
        tensor = tensor.index_select(-1, columns)
    return tensor


def is_open(size: int) -> bool:
    """Whether torch.export traces for any value of a size."""
    return isinstance(size, torch.SymInt)


def _up(size: int, multiple: int) -> int:
    # Without a negative number: exported, a division rounds toward zero.
    return (size + multiple - 1) // multiple * multiple


def _starts(length: int, view: int) -> list[int]:
    """Where views of `view` start so that they cover `length`, both in patches.

    Rounding down keeps neighbors at most `view` apart, as the even spacing is.
    """
    count = -(-length // view)
    return [index * (length - view) // max(count - 1, 1) for index in range(count)]


def _nearest(starts: list[int], length: int, view: int) -> tuple[list[int], list[int]]:
    """For each of `length` places the view whose center is nearest, and its index within it."""
    owner = []
    for place in range(length):
        reach = [abs(2 * place + 1 - (2 * start + view)) for start in starts]
        owner.append(reach.index(min(reach)))
    return owner, [place - starts[view_] for place, view_ in enumerate(owner)]
