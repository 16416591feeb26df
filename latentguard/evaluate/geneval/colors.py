"""The color of an object's pixels, as one of GenEval's ten names."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from latentguard.evaluate.geneval.prompts import COLORS

# sRGB, what the names mean to most people; browns, oranges and pinks differ by lightness alone.
_SHOWN = {
    "red": ((205, 30, 35), (140, 20, 25), (235, 60, 60)),
    "orange": ((245, 135, 25), (225, 110, 30)),
    "yellow": ((245, 220, 50), (215, 190, 40)),
    "green": ((50, 150, 60), (30, 85, 40), (120, 190, 90)),
    "blue": ((35, 80, 190), (20, 40, 110), (90, 160, 225)),
    "purple": ((120, 50, 150), (80, 40, 110), (160, 110, 190)),
    "pink": ((245, 150, 185), (230, 100, 150)),
    "brown": ((115, 70, 40), (75, 45, 30), (150, 100, 65)),
    "black": ((20, 20, 20), (50, 50, 52)),
    "white": ((245, 245, 245), (205, 205, 205)),
}


def color_of(pixels: NDArray[np.uint8]) -> str | None:
    """The name that most pixels [n, 3] are nearest to in CIELAB; None without pixels."""
    if len(pixels) == 0:
        return None
    names = [name for name in COLORS for _ in _SHOWN[name]]
    shown = np.array([rgb for name in COLORS for rgb in _SHOWN[name]], np.uint8)
    distance = ((_lab(pixels)[:, None] - _lab(shown)[None]) ** 2).sum(-1)
    votes = [names[index] for index in distance.argmin(1)]
    return max(COLORS, key=votes.count)


def _lab(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """sRGB [n, 3] to CIELAB under D65."""
    share = rgb.astype(np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab: NDArray[np.float64] = np.stack(
        [
            116 * root[:, 1] - 16,
            500 * (root[:, 0] - root[:, 1]),
            200 * (root[:, 1] - root[:, 2]),
        ],
        axis=1,
    )
    return lab
