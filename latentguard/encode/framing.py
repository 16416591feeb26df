"""Which part of a picture is encoded, at which size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentsError, UsageError

if TYPE_CHECKING:
    from PIL import Image

Crop = Literal["center", "none", "resize"]
"""What becomes of a picture of another shape than the one that is asked for (`Framing`)."""
CROPS = ("center", "none", "resize")
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture."""

DEFAULT_SIZE = "512"
ORIGINAL = "original"
MAX_SIDE = 8192
"""Pixels: a picture of that width and height has as many cells as latents files may have."""


@dataclass(frozen=True)
class Framing:
    """What is encoded of a picture.

    size: (width, height) in pixels; a whole number N for a square, or for the shorter side where
        nothing is cropped; None for the picture's own size.
    crop: `center` takes the largest part of the wanted shape from the middle, and scales it.
        `none` keeps the whole picture and its shape: a number is its shorter side, a width and
        height are what it is made to fit in. `resize` stretches the whole picture to the size.
    multiple: both sides become multiples of so many pixels. What is over is cut off evenly on both
        sides, less than one such step.

    Raises:
        UsageError: a size that is no multiple or too large, or a crop that does not go with it.
    """

    size: tuple[int, int] | int | None
    crop: Crop = "center"
    multiple: int = 8

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UsageError(f"--crop must be {', '.join(CROPS)}, got {self.crop!r:.60}")
        if self.size is None and self.crop == "resize":
            raise UsageError("--crop resize stretches to a size: give --size, such as 512")
        for side in self._sides():
            if not self.multiple <= side <= MAX_SIDE:
                raise UsageError(
                    f"--size must be from {self.multiple} to {MAX_SIDE} pixels, got {side}"
                )
            if side % self.multiple and self.crop != "none":
                nearest = max(self.multiple, round(side / self.multiple) * self.multiple)
                raise UsageError(
                    f"--size must be a multiple of {self.multiple} pixels for this autoencoder, "
                    f"got {side}: {nearest} is the nearest"
                )

    @classmethod
    def parse(cls, size: str | int, crop: Crop = "center", multiple: int = 8) -> Framing:
        """As an operator says it: `512`, `1024x768` (width x height), or `original`."""
        text = str(size).strip().lower()
        if text == ORIGINAL:
            return cls(None, crop, multiple)
        found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
        if found is None:
            raise UsageError(
                f"--size must be a number of pixels, WIDTHxHEIGHT or {ORIGINAL}, got {size!r:.60}"
            )
        if found[2] is None:
            return cls(int(found[1]), crop, multiple)
        return cls((int(found[1]), int(found[2])), crop, multiple)

    def _sides(self) -> tuple[int, ...]:
        if self.size is None:
            return ()
        return (self.size,) if isinstance(self.size, int) else self.size

    @property
    def uniform(self) -> bool:
        """Whether all pictures come out in one size."""
        return self.size is not None and self.crop != "none"

    def apply(self, image: Image.Image) -> tuple[NDArray[np.uint8], Box]:
        """uint8 [H, W, 3] of an RGB picture, and which part of it that is.

        Bicubic, with Pillow's antialiasing. Raises LatentsError where the result would be empty or
        too large.
        """
        from PIL import Image

        width, height = self._target(*image.size)
        for side in (width, height):
            if not 0 < side <= MAX_SIDE:
                raise LatentsError(
                    f"has {image.size[0]} x {image.size[1]} pixels, of which {width} x {height} "
                    f"would be encoded: both must be from {self.multiple} to {MAX_SIDE}"
                )
        box = self._box(*image.size, width, height)
        resized = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        return np.asarray(resized), box

    def _scaled(self, width: int, height: int) -> tuple[float, float]:
        """The whole picture's size before its sides are made multiples; of `none` and no size."""
        if self.size is None:
            return width, height
        if isinstance(self.size, int):
            factor = self.size / min(width, height)
        else:
            factor = min(self.size[0] / width, self.size[1] / height)
        return width * factor, height * factor

    def _target(self, width: int, height: int) -> tuple[int, int]:
        if self.size is not None and self.crop != "none":
            return (self.size, self.size) if isinstance(self.size, int) else self.size
        # A side that is a whole number but for rounding is that number.
        wide, high = (
            int(side + 1e-6) // self.multiple * self.multiple
            for side in self._scaled(width, height)
        )
        return wide, high

    def _box(self, width: int, height: int, wide: int, high: int) -> Box:
        if self.crop == "resize":
            return 0, 0, width, height
        if self.size is None or self.crop == "none":
            whole = self._scaled(width, height)
            kept = wide * width / whole[0], high * height / whole[1]
        else:
            factor = min(width / wide, height / high)
            kept = wide * factor, high * factor
        # Sides that differ from the picture's by rounding alone are the picture's.
        across, down = (
            side if abs(part - side) < 1e-6 else part
            for part, side in zip(kept, (width, height), strict=True)
        )
        left, top = (width - across) / 2, (height - down) / 2
        if (across, down) == (wide, high):  # nothing is scaled: whole pixels stay what they are
            left, top = left // 1, top // 1
        return left, top, left + across, top + down
