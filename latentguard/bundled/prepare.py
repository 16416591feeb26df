"""What the packaged networks do that depends on the size of latents, in NumPy: everything up to the
first convolution that reads grids of any size. The other half is an ONNX graph.

Same numbers as `latentguard.encoders.nano_net` in PyTorch, where the reasons stand.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from latentguard.encoders.nano_sizes import COARSE, GRID, OCTAVES, SMALLEST, VIEW

Array = NDArray[np.float32]


def grid_of(latents: Array, halve: Array, bias: Array, mean: Array, std: Array) -> Array:
    """Latents [B, C, h, w] -> the grid of about 32 x 32 cells that nano-flux2's network reads.

    halve [C, C, k, k], bias [C]: the map that halves a grid. mean, std [C, 1, 1].
    """
    x = latents
    while x.shape[2] * x.shape[3] > 2 * GRID**2 and min(x.shape[2:]) >= SMALLEST:
        x = _halved(x, halve, bias)
    x = (x - mean) / std
    ratio: float = GRID / (x.shape[2] * x.shape[3]) ** 0.5
    if not 0.75 < ratio < 1.34:
        size = [max(4, round(n * ratio / 4) * 4) for n in x.shape[2:]]
        x = _resized(x, (size[0], size[1]), "linear", antialias=ratio < 1)
    return np.ascontiguousarray(x)


def picture_of(latents: Array, factors: Array, bias: Array, size: int, octaves: int) -> Array:
    """Latents [B, C, h, w] -> the RGB picture [B, 3, ~size, ~size] that nano-view's network reads.

    factors [C, 3], bias [3]: the space's linear view.
    """
    rgb = np.einsum("bchw,cr->brhw", latents, factors, optimize=True)
    view: Array = (rgb + bias.reshape(3, 1, 1)) * np.float32(0.5) + np.float32(0.5)
    if octaves:
        view = _leveled(view.clip(*VIEW), octaves)
    ratio: float = size / (view.shape[2] * view.shape[3]) ** 0.5
    sides = [max(32, round(n * ratio / 32) * 32) for n in view.shape[2:]]
    if sides != list(view.shape[2:]):
        view = _resized(view, (sides[0], sides[1]), "cubic", antialias=ratio < 1)
    return np.ascontiguousarray(view)


def _halved(x: Array, weight: Array, bias: Array) -> Array:
    """A convolution of stride 2 whose edges are continued by their own cells."""
    kernel = weight.shape[-1]
    pad = (kernel - 2) // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="edge")
    windows = sliding_window_view(padded, (kernel, kernel), axis=(2, 3))[:, :, ::2, ::2]
    found: Array = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3)))
    return (found + bias).transpose(0, 3, 1, 2)


# -- octaves ---------------------------------------------------------------------------------


def _leveled(view: Array, octaves: int) -> Array:
    found: list[Array] = []
    for _ in range(octaves):
        if min(view.shape[2:]) < 2:
            break
        coarser = _pooled(view)
        found.append(view - _as_large(coarser, view))
        view = coarser
    mean = view.mean((1, 2, 3), keepdims=True)
    view = (view - mean) * _gain(view - mean, COARSE, 0.3, (0.7, 1.5)) + mean
    for octave, usual in zip(reversed(found), reversed(OCTAVES[: len(found)]), strict=True):
        view = octave * _gain(octave, usual, 0.8, (0.3, 1.3)) + _as_large(view, octave)
    return view


def _pooled(x: Array) -> Array:
    """Means of 2 x 2 cells; an odd last row or column is left out."""
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    cells = x[:, :, :h, :w]
    found: Array = (
        cells[:, :, ::2, ::2]
        + cells[:, :, 1::2, ::2]
        + cells[:, :, ::2, 1::2]
        + cells[:, :, 1::2, 1::2]
    ) / np.float32(4)
    return found


def _as_large(coarser: Array, finer: Array) -> Array:
    return _resized(coarser, (finer.shape[2], finer.shape[3]), "linear", antialias=False)


def _gain(octave: Array, usual: float, power: float, bounds: tuple[float, float]) -> Array:
    deviation = np.sqrt(np.square(octave).mean((1, 2, 3), keepdims=True) + np.float32(1e-6))
    gain: Array = np.power(np.float32(usual) / deviation, np.float32(power)).clip(*bounds)
    return gain


# -- resizing --------------------------------------------------------------------------------


def _resized(
    x: Array, size: tuple[int, int], kind: Literal["linear", "cubic"], *, antialias: bool
) -> Array:
    """[B, C, h, w] -> [B, C, *size], as torch.nn.functional.interpolate does without aligned
    corners."""
    rows = resize_matrix(x.shape[2], size[0], kind, antialias=antialias)
    columns = resize_matrix(x.shape[3], size[1], kind, antialias=antialias)
    found: Array = rows @ (x @ columns.T)
    return found


def resize_matrix(
    before: int, after: int, kind: Literal["linear", "cubic"], *, antialias: bool
) -> Array:
    """The weights [after, before] of each cell in each new one; rows sum to 1.

    With `antialias` the filter is as wide as a new cell, is cut at the edges, and is Keys' cubic
    with a = -0.5; without, edges are continued, and a = -0.75. Both as PyTorch has it.
    """
    scale = before / after
    centers = (np.arange(after) + 0.5) * scale
    reach = {"linear": 1, "cubic": 2}[kind]
    width = max(scale, 1.0) if antialias else 1.0
    matrix = np.zeros((after, before))
    for row, center in enumerate(centers):
        first = int(np.floor(center - reach * width - 1))
        places = np.arange(first, int(np.ceil(center + reach * width + 1)) + 1)
        weights = _filter((places + 0.5 - center) / width, kind, -0.5 if antialias else -0.75)
        if antialias:
            inside = (places >= 0) & (places < before)
            places, weights = places[inside], weights[inside]
            weights = weights / weights.sum()
        np.add.at(matrix[row], places.clip(0, before - 1), weights)
    found: Array = matrix.astype(np.float32)
    return found


def _filter(x: NDArray[Any], kind: str, a: float) -> NDArray[Any]:
    x = np.abs(x)
    if kind == "linear":
        triangle: NDArray[Any] = np.maximum(0.0, 1 - x)
        return triangle
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    found: NDArray[Any] = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return found
