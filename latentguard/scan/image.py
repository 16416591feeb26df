"""Small pictures as PNG data URIs: previews in RGB, heat maps through a palette. No Pillow."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

LEVELS = 65
"""Levels of a heat map, an odd number: the middle one is the threshold."""

# Red, green, blue, opacity from far under a threshold to far over it. Dark blue veils the picture
# where the concept is not, nothing covers it at the threshold, yellow covers it where the concept
# is: lightness rises all the way, so the order survives every kind of color vision and gray print.
_RAMP = np.array(
    [
        (6, 12, 40, 0.76),
        (10, 24, 66, 0.55),
        (40, 60, 100, 0.12),
        (255, 176, 0, 0.30),
        (255, 214, 10, 0.50),
    ]
)


def ramp(levels: int = LEVELS) -> np.ndarray:
    """Color and opacity of each level, uint8 [levels, 4]."""
    at = np.linspace(0, len(_RAMP) - 1, levels)
    columns = [np.interp(at, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(4)]
    return np.stack([*columns[:3], 255 * columns[3]], axis=1).round().astype(np.uint8)


def rgb_png(pixels: np.ndarray, max_side: int = 128) -> bytes:
    """PNG of uint8 [h, w, 3]; sides above `max_side` are averaged down by a whole factor."""
    factor = -(-max(pixels.shape[:2]) // max_side)
    if factor > 1:
        pixels = _shrink(pixels, factor)
    return _png(np.ascontiguousarray(pixels), color_type=2)


def heat_png(heat: np.ndarray, low: float, high: float) -> bytes:
    """PNG with a palette and opacity of float [h, w], `low` the darkest level, `high` the lightest.

    NaN shows as the lowest level.
    """
    t = (np.nan_to_num(heat, nan=low) - low) / max(high - low, 1e-12)
    levels = (np.clip(t, 0.0, 1.0) * (LEVELS - 1)).round().astype(np.uint8)
    return _png(levels[:, :, None], color_type=3, extra=_PALETTE_CHUNKS)


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def outline(mask: np.ndarray) -> str:
    """SVG path data around the True cells of [h, w], one unit a cell; empty where there is none."""
    padded = np.pad(mask.astype(bool), 1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]  # [h + 1, w]: an edge above row y
    down = padded[1:-1, 1:] != padded[1:-1, :-1]  # [h, w + 1]: an edge left of column x
    parts = [f"M{a} {y}H{b}" for y, row in enumerate(across) for a, b in _runs(row)]
    parts += [f"M{x} {a}V{b}" for x, column in enumerate(down.T) for a, b in _runs(column)]
    return "".join(parts)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of each run of True in a row of flags."""
    steps = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(steps[::2], steps[1::2], strict=True)]


def _shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Box average; the edge is repeated where a side is no multiple of `factor`."""
    height, width = pixels.shape[:2]
    pad = ((0, -height % factor), (0, -width % factor), (0, 0))
    padded = np.pad(pixels, pad, mode="edge").astype(np.float64)
    rows, columns = padded.shape[0] // factor, padded.shape[1] // factor
    blocks = padded.reshape(rows, factor, columns, factor, 3)
    return np.asarray(blocks.mean(axis=(1, 3)).round().astype(np.uint8))


def _png(pixels: np.ndarray, color_type: int, extra: bytes = b"") -> bytes:
    """Encode uint8 [h, w, channels] (https://www.w3.org/TR/png-3/), filter 0 on every row."""
    height, width = pixels.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + extra
        + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_PALETTE_CHUNKS = _chunk(b"PLTE", ramp()[:, :3].tobytes()) + _chunk(b"tRNS", ramp()[:, 3].tobytes())
