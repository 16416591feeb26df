"""From the numbers of a file to those of latents: types that files do not say, whole numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.claims import Image
from latentguard.files.options import Reading
from latentguard.spaces.arrays import BFLOAT16, native, widened

_FLOATS = {"f2", "f4", "f8"}
# bfloat16 as numpy.save writes it (V2), and as views of its bits.
_BITS = {"V2", "u2", "i2"}


@dataclass(frozen=True)
class Numbers:
    """What the numbers of one array are.

    stored: their type in the file. dequantize: (scale, zero) of whole numbers. factor: what they
    are multiplied by, in float32; None for 1.
    """

    stored: np.dtype[Any]
    dequantize: tuple[float, float] | None = None
    factor: float | None = None

    def latents(self, image: Image) -> Image:
        """One image as floating point numbers, an array of its own."""
        if self.dequantize is not None:
            scale, zero = self.dequantize
            wide = image.astype(np.float32) - np.float32(zero)
            return np.ascontiguousarray(wide * np.float32(scale))
        image = native(image)
        if self.factor is not None:
            return widened(image).astype(np.float32) * np.float32(self.factor)
        return image


def numbers_of(stored: np.dtype[Any], reading: Reading, expected: str, shown: str = "") -> Numbers:
    """How numbers of a type are read.

    Args:
        stored: `BFLOAT16`, or what NumPy calls it.
        expected: the types of latents in that format, for the error.
        shown: the format's own name of the type, likewise.

    Raises:
        LatentsError: latents have no such type, or it is not said what the numbers are.
    """
    kind = stored.str[1:]
    if stored == BFLOAT16 or kind in _FLOATS:
        return Numbers(stored)
    if kind in _BITS and reading.dtype == "bfloat16" and stored.str[0] != ">":
        return Numbers(BFLOAT16)
    if kind in ("u1", "i1"):
        if reading.dequantize is not None:
            return Numbers(stored, reading.dequantize)
        raise LatentsError(
            f"latents must be {expected}, got {shown or stored}: if these are "
            "quantized latents, say --dequantize SCALE,ZERO, of (number - ZERO) * SCALE"
        )
    raise LatentsError(f"latents must be {expected}, got {shown or _kind(stored)}")


def _kind(dtype: np.dtype[Any]) -> str:
    """A type that latents do not have, and what to do about it."""
    if dtype.hasobject:
        return (
            "objects, which would have to be unpickled: save one array of numbers, "
            "numpy.stack(list).astype(numpy.float32)"
        )
    if dtype.str[1:] == "V2":
        return (
            "V2: this is bfloat16 as numpy.save writes it, without its type; say --dtype bfloat16, "
            "or save latents.astype(numpy.float32), or use safetensors"
        )
    if dtype.str[1:] in _BITS:
        return f"{dtype}: if these are the bits of bfloat16, say --dtype bfloat16"
    return f"{dtype}"[:100]
