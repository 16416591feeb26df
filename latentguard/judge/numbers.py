"""Which images have numbers that can be judged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 1e6
"""Latents are at most a few thousand, at the noisiest steps. Networks that read far larger numbers
overflow inside, and their clips hide it: what they then score is not the image."""


def usable(latents: NDArray[Any]) -> NDArray[np.bool_]:
    """Of latents [B, ...] those images whose numbers are finite and at most LARGEST, [B]."""
    found: NDArray[np.bool_] = (np.abs(latents) <= LARGEST).reshape(len(latents), -1).all(axis=1)
    return found
