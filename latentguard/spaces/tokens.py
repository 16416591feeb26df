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
contact sheets, enlargements, added noise) none is refused; of their 1,104 false sizes 95 % are.
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
    Places = NDArray[np.int64]

# Fewer tokens (16x16 cells) say too little.
MIN_TOKENS = 64
# Of more tokens (128x128 cells) a sample is enough, and the cost stays bounded.
MAX_TOKENS = 4096
# How much rougher than another layout the declared one must be. Pictures: at most 0.91 (see above).
ROUGHER = 1.04
# The same for noise, whose roughness varies with the number n of differences: this / sqrt(n) is
# three of its standard deviations.
NOISE = 3.0
# The other layout must look like a picture's: its roughness (false sizes of the pictures above:
# 1.01 to 1.2 for the true one), and 8 cells (64 pixels) at least high and wide.
SMOOTH = 1.2
MIN_SIDE = 4
# Whole tokens below each other differ more than their borders, by their root mean squares: 1.15
# times in the median, 1.05 at least. Less is a repetition, as in a contact sheet.
REPEATED = 1.05
# Borders between tokens below each other, against those between tokens on a diagonal: 0.84 in the
# median, at most 0.96.
BELOW = 0.97
# How far the ends of rows must stand out where the declared layout is a single row.
ROW_END = 1.1
# Below this correlation of neighboring columns nothing is told (0.28 in the tokens of a picture).
RELATED = 0.15


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
        of = "" if len(tokens) == 1 else f" of image {number}"
        raise LatentsError(
            f"packed latents are said to be of {height}x{width} cells, but the rows{of} do not "
            f"continue each other as a picture's do (their borders are {roughness:.2f} times as "
            f"rough as tokens are inside), while {rows * patch}x{better * patch} cells fit "
            f"({smoother:.2f}): give the height and width that they were packed with"
        )


def check_layout(image: NDArray[Any], space: LatentSpace) -> None:
    """Refuse one image [C, H, W] that is a batch of packed tokens [B, N, C * 4], or the reverse.

    Both have three axes, and where one has as many packed channels as the image has columns, only
    the numbers tell. Columns 2 and 3 of four are neighbors in either. Columns 4 and 5 are neighbors
    in a picture, and of different channels in tokens. Measured on the bundled 25 pictures and crops
    of them: the correlation of 4 and 5 is at most 0.42 times that of 2 and 3 in tokens, and at
    least 0.84 times in pictures; in 99 % of single channels that are read as tokens it is over 0.5.

    Args:
        image: tokens [N, C * 4] or an image [C, H, W] as it is said to be.

    Raises LatentsError. Noise and flat images tell nothing and pass.
    """
    if space.packed_patch == 1:
        return  # of which there are no tokens
    columns = image.reshape(-1, image.shape[-1]).astype(np.float64)
    columns = columns[:: max(1, len(columns) // MAX_TOKENS)]
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = columns.std(axis=0)
        columns = (columns - columns.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    patch = space.packed_patch**2
    inside = float((columns[:, 1::patch] * columns[:, 2::patch]).mean())
    across = float((columns[:, patch - 1 : -1 : patch] * columns[:, patch::patch]).mean())
    packed = image.ndim == 2
    if inside < RELATED or (across > inside / 2) is not packed:
        return
    said, found = ("packed tokens", "one image") if packed else ("one image", "packed tokens")
    raise LatentsError(
        f"is read as {said}, but its numbers are those of {found}: declare layout (spatial or "
        "packed) as it is, and for packed ones height and width in latent cells"
    )


def _cells(image: NDArray[Any], space: LatentSpace) -> Array:
    """[N, C, 2, 2], each packed channel of mean 0 and deviation 1 (0 where it is constant)."""
    patch = space.packed_patch
    numbers = image.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # numbers that float32 does not hold
        deviation = numbers.std(axis=0)
        normal = (numbers - numbers.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    cells: Array = normal.astype(np.float32).reshape(-1, space.channels, patch, patch)
    return cells


class _Borders:
    """Differences across the borders of tokens, as multiples of those within tokens.

    places: the tokens that are looked at, in order; a sample of a large image.
    """

    def __init__(self, cells: Array) -> None:
        self._cells = cells
        self._top, self._bottom = cells[:, :, 0], cells[:, :, -1]
        self._left, self._right = cells[..., 0], cells[..., -1]
        self._down = float(np.abs(self._bottom - self._top).mean())
        self._along = float(np.abs(self._right - self._left).mean())
        self.flat = min(self._down, self._along) < 1e-6
        self.count = len(cells)
        self._random = np.random.default_rng(0)
        self.places: Places = np.arange(self.count)
        if self.count > MAX_TOKENS:
            self.places = np.sort(self._random.choice(self.count, MAX_TOKENS, replace=False))

    def before(self, lag: int) -> Places:
        """The places that have a token `lag` tokens later."""
        return self.places[self.places < self.count - lag]

    def down(self, above: Places, lag: int) -> float:
        """From the lower edge of tokens to the upper edge of those `lag` later."""
        return self._roughness(self._bottom[above], self._top[above + lag])

    def anywhere(self) -> float:
        """From the lower edge of tokens to the upper edge of any other ones."""
        others = self._random.permutation(self.count)[: len(self.places)]
        return self._roughness(self._bottom[self.places], self._top[others])

    def repeats(self, above: Places, lag: int) -> bool:
        """Whether tokens differ from those `lag` later no more than across the border to them.

        In squares, which count what a picture shows rather than its even background.
        """
        whole = np.square(self._cells[above] - self._cells[above + lag]).mean()
        border = np.square(self._bottom[above] - self._top[above + lag]).mean()
        return bool(whole < REPEATED**2 * border)

    def along(self, left: Places) -> float:
        """From the right edge of tokens to the left edge of the next ones."""
        return float(np.abs(self._right[left] - self._left[left + 1]).mean()) / self._along

    def _roughness(self, above: Array, below: Array) -> float:
        return float(np.abs(above - below).mean()) / self._down


def _better_width(cells: Array, declared: int) -> tuple[int, float, float] | None:
    """A width in tokens that fits clearly better than the declared one, and both roughnesses."""
    borders = _Borders(cells)
    if borders.flat:
        return None
    count = len(cells)
    margin = ROUGHER + NOISE / math.sqrt(len(borders.places) * cells[0, :, 0].size)
    # A single row has no border below it: as rough as between any two tokens.
    single = declared == count
    roughness = borders.anywhere() if single else borders.down(borders.before(declared), declared)
    if roughness < margin:
        return None
    fitting = [
        (smoother, width)
        for width in range(MIN_SIDE, count // MIN_SIDE + 1)
        if count % width == 0 and width != declared
        for smoother in [_roughness_of_other(borders, width, declared)]
        if smoother <= SMOOTH
        and roughness >= margin * smoother
        and _explains(borders, width, declared, roughness / smoother)
    ]
    if not fitting:
        return None
    smoother, better = min(fitting)
    return better, roughness, smoother


def _roughness_of_other(borders: _Borders, width: int, declared: int) -> float:
    """The roughness of another layout.

    Below a token of that layout lies, as the declared one has it, a token of one row or of the
    next: stripes can make one of them similar, so that both have to be smooth.
    """
    above = borders.before(width)
    same_row = above % declared + width % declared < declared
    groups = [group for group in (above[same_row], above[~same_row]) if len(group)]
    return max(borders.down(group, width) for group in groups)


def _explains(borders: _Borders, width: int, declared: int, gain: float) -> bool:
    """Whether another layout that is smoother is that of a picture in itself.

    Stripes and repetitions, as in a contact sheet, are smooth in layouts that are not theirs. gain:
    how much smoother it is.
    """
    above = borders.before(width)
    if borders.repeats(above, width):
        return False  # below a token of a picture lies another one, not itself again
    left = borders.before(1)
    inside = left % width != width - 1
    ends = left % declared == declared - 1
    if (inside & ends).any() and (inside & ~ends).any():
        # The declared layout's row ends lie within rows of the other one, and must look so.
        jump = borders.along(left[inside & ends]) / borders.along(left[inside & ~ends])
        limit = 1 + 0.8 * (gain - 1)
        if jump > limit:
            return False
    if 1 < declared < width:
        # Cells below each other are closer than those on a diagonal, in the true layout alone.
        below, *diagonal = (
            borders.down(borders.before(lag), lag) for lag in (declared, declared - 1, declared + 1)
        )
        if below < BELOW * sum(diagonal) / 2:
            return False
    if declared == borders.count:
        return borders.along(left[~inside]) >= ROW_END * borders.along(left[inside])
    return True
