"""The linear RGB view of a latent space, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class RGBView:
    """A linear map of one latent cell to one pixel, about [-1, 1]: `cell @ matrix + bias`.

    Attributes:
        factors: [channels][3], for red, green and blue.
        bias: [3].
        scaled: True where the map is of scaled latents, False where it is of raw ones.
        source: where the numbers come from.
        r2: the share of the variance of red, green and blue that the map explains on real latents,
            or None where nobody has measured it.
    """

    factors: tuple[RGB, ...]
    bias: RGB
    scaled: bool = True
    source: str = ""
    r2: RGB | None = None

    @property
    def matrix(self) -> NDArray[np.float64]:
        """`factors` as an array [channels, 3]."""
        return np.asarray(self.factors, np.float64)

    @property
    def offset(self) -> NDArray[np.float64]:
        """`bias` as an array [3]."""
        return np.asarray(self.bias, np.float64)
