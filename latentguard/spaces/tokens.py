"""Whether packed tokens can be of the height and width that somebody says they have.

Packed tokens do not carry their size, and a false one shows another image: rows of tokens are cut
at other places. In a picture, cells on either side of a token's border differ as much as cells
inside of a token do. So each layout has a roughness: the difference of cells across the borders
between rows of tokens, as a multiple of the difference within tokens, which no layout changes. The
true layout's is about 1. A size is refused where its roughness is clearly higher than that of
another layout, and that one looks like a picture's. Noise and flat latents are as rough in every
layout, and what repeats may be as smooth in another: there the size that is said stands.

Measured on 97 pictures in TAEF2's latents, 32x32 to 20x64 cells. Roughness of the true layout: 0.97
to 1.07, and at most 0.91 of any other layout's. Of 3,589 honest variants (flips, crops, strips,
contact sheets, enlargements, added noise) none is refused; of their 1,104 false sizes 94 % are.
Most of those that are not are 2 or 4 cells high or wide.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from latentguard.errors import LatentsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from latentguard.spaces.space import LatentSpace

    Array = NDArray[np.float32]

# Fewer tokens (16x16 cells) say too little.
MIN_TOKENS = 64
# How much rougher than another layout the declared one must be. Pictures: at most 0.91 (see above).
ROUGHER = 1.04
# The same for noise, whose roughness varies with the number n of differences: this / sqrt(n) is
# three of its standard deviations.
NOISE = 3.0
# The other layout must look like a picture's: its roughness (false sizes of the pictures above:
# 1.01 to 1.2 for the true one), and 8 cells (64 pixels) at least high and wide.
SMOOTH = 1.2
MIN_SIDE = 4
# Whole tokens below each other differ more than their borders: 1.15 times in the median. Less is a
# repetition, as in a contact sheet.
REPEATED = 1.05
# Borders between tokens below each other, against those between tokens on a diagonal: 0.84 in the
# median, at most 0.96.
BELOW = 0.98
# How far the ends of rows must stand out where the declared layout is a single row.
ROW_END = 1.1


def check_size(tokens: NDArray[Any], space: LatentSpace, height: int, width: int) -> None:
    """Refuse packed tokens [B, N, C * 4] whose numbers deny that they are height x width cells.

    Raises LatentsError, which names a size that fits better, for the first such image. Numbers that
    are not finite are left to others to refuse.
    """
    patch = space.packed_patch
    declared = width // patch
    for number, image in enumerate(tokens):
        if len(image) < MIN_TOKENS or not np.isfinite(image).all():
            continue
        found = _better_width(_cells(image, space), declared)
        if found is None:
            continue
        better, roughness, smoother = found
        rows = len(image) // better
        raise LatentsError(
            f"packed latents {number} are said to be of {height}x{width} cells, but their rows do "
            f"not continue each other as a picture's do (their borders are {roughness:.2f} times "
            f"as rough as tokens are inside), while {rows * patch}x{better * patch} cells fit "
            f"({smoother:.2f}): give the height and width that they were packed with"
        )


def _cells(image: NDArray[Any], space: LatentSpace) -> Array:
    """[N, C, 2, 2], each packed channel of mean 0 and deviation 1 (0 where it is constant)."""
    patch = space.packed_patch
    numbers = image.astype(np.float64)
    deviation = numbers.std(axis=0)
    normal = (numbers - numbers.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    cells: Array = normal.astype(np.float32).reshape(-1, space.channels, patch, patch)
    return cells


class _Borders:
    """Differences across the borders of tokens, as multiples of those within tokens."""

    def __init__(self, cells: Array) -> None:
        self._cells = cells
        self._top, self._bottom = cells[:, :, 0], cells[:, :, -1]
        self._left, self._right = cells[..., 0], cells[..., -1]
        self._down = float(np.abs(self._bottom - self._top).mean())
        self._along = float(np.abs(self._right - self._left).mean())
        self.flat = min(self._down, self._along) < 1e-6

    def down(self, above: NDArray[np.int64], below: NDArray[np.int64]) -> float:
        """From the lower edge of some tokens to the upper edge of others."""
        return float(np.abs(self._bottom[above] - self._top[below]).mean()) / self._down

    def whole(self, tokens: NDArray[np.int64], others: NDArray[np.int64]) -> float:
        """From all cells of some tokens to those of others."""
        return float(np.abs(self._cells[tokens] - self._cells[others]).mean()) / self._down

    def along(self, left: NDArray[np.int64]) -> float:
        """From the right edge of some tokens to the left edge of the next ones."""
        return float(np.abs(self._right[left] - self._left[left + 1]).mean()) / self._along


def _better_width(cells: Array, declared: int) -> tuple[int, float, float] | None:
    """A width in tokens that fits clearly better than the declared one, and both roughnesses."""
    borders = _Borders(cells)
    if borders.flat:
        return None
    count = len(cells)
    places = np.arange(count)
    margin = ROUGHER + NOISE / math.sqrt(cells[..., 0].size)
    if declared < count:
        roughness = borders.down(places[:-declared], places[declared:])
    else:  # a single row has no border below it: as rough as between any two tokens
        roughness = borders.down(places, np.random.default_rng(0).permutation(count))
    if roughness < margin:
        return None
    fitting = [
        (smoother, width)
        for width in range(MIN_SIDE, count // MIN_SIDE + 1)
        if count % width == 0 and width != declared
        for smoother in [_roughness_of_other(borders, places, width, declared)]
        if smoother <= SMOOTH
        and roughness >= margin * smoother
        and _explains(borders, places, width, declared, roughness / smoother)
    ]
    if not fitting:
        return None
    smoother, better = min(fitting)
    return better, roughness, smoother


def _roughness_of_other(
    borders: _Borders, places: NDArray[np.int64], width: int, declared: int
) -> float:
    """The roughness of another layout.

    Below a token of that layout lies, as the declared one has it, a token of one row or of the
    next: stripes can make one of them similar, so that both have to be smooth.
    """
    above = places[:-width]
    same_row = above % declared + width % declared < declared
    groups = [group for group in (above[same_row], above[~same_row]) if len(group)]
    return max(borders.down(group, group + width) for group in groups)


def _explains(
    borders: _Borders, places: NDArray[np.int64], width: int, declared: int, gain: float
) -> bool:
    """Whether another layout that is smoother is that of a picture in itself.

    Stripes and repetitions, as in a contact sheet, are smooth in layouts that are not theirs. gain:
    how much smoother it is.
    """
    above = places[:-width]
    if borders.whole(above, above + width) < REPEATED * borders.down(above, above + width):
        return False  # tokens repeat: below a token of a picture lies another one
    left = places[:-1]
    inside = left % width != width - 1
    row_ends = left % declared == declared - 1
    if declared > 1 and (inside & row_ends).any():
        # The declared layout's row ends lie within rows of the other one, and must look so.
        jump = borders.along(left[inside & row_ends]) / borders.along(left[inside & ~row_ends])
        limit = 1 + 0.8 * (gain - 1)
        if not 1 / limit <= jump <= limit:
            return False
    if 1 < declared < width:
        # Cells below each other are closer than those on a diagonal, in the true layout alone.
        around = [borders.down(places[:-lag], places[lag:]) for lag in (declared - 1, declared + 1)]
        if borders.down(places[:-declared], places[declared:]) < BELOW * sum(around) / 2:
            return False
    if declared == len(places):
        return borders.along(left[~inside]) >= ROW_END * borders.along(left[inside])
    return True
