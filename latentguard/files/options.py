"""What the caller says about files: which array counts, and how its numbers are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from latentguard.errors import LatentsError
from latentguard.files.claims import Claims
from latentguard.spaces import LatentSpace, Layout

Dtype = Literal["bfloat16", "float16", "float32", "uint8", "int8"]
"""What numbers without a type are (`Reading.dtype`)."""

DTYPES = ("bfloat16", "float16", "float32", "uint8", "int8")
DEQUANTIZATIONS = {"imagenet.int8": (24 / 255, 127.5)}
"""Dequantizations with a name: (scale, zero)."""

_MAX_NAME = 1024


class Options(TypedDict, total=False):
    """`Reading` as keywords, beside space and scaling."""

    layout: Layout | None
    height: int | None
    width: int | None
    pixels: bool
    key: str | None
    member: str | None
    moments: bool
    dequantize: str | tuple[float, float] | None
    dtype: Dtype | None
    strict: bool


@dataclass(frozen=True)
class Reading:
    """How files are read. Everything is optional. It can be pickled and sent to other processes.

    Attributes:
        space, scaled: what files do not say about themselves. A file that says something else is an
            error. A space is a name, a file of your own, or a LatentSpace (which it becomes).
        layout, height, width: the same, for arrays whose shape leaves them open. Packed tokens need
            height and width, in latent cells.
        pixels: height and width are in pixels. This also holds for those in files that do not say
            their layout.
        key: the array that holds the latents: a key of a dict, an .npz, a .safetensors or a column
            of a table; `a/b` or `a.b` for the key b of what is under a. Other arrays are then
            counted and not an error.
        member: the ending of the members of a shard that hold the latents, without the key of the
            sample: `latents.npy`, `npy`, `moments.npy`. Others are then counted and not an error.
        moments: arrays hold means and then deviations (or their logarithms), twice the channels.
            The means are the latents.
        dequantize: (scale, zero) of whole numbers, which become (number - zero) * scale in float32;
            or a name of `DEQUANTIZATIONS`.
        dtype: the type of numbers that carry none: bytes of a table, bfloat16 of `numpy.save`.
        strict: whatever would be passed over, because it does not hold latents, is an error.

    Raises:
        LatentsError: an invalid value.
    """

    space: LatentSpace | None = None
    scaled: bool | None = None
    layout: Layout | None = None
    height: int | None = None
    width: int | None = None
    pixels: bool = False
    key: str | None = None
    member: str | None = None
    moments: bool = False
    dequantize: tuple[float, float] | None = None
    dtype: Dtype | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("pixels", "moments", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise LatentsError(f"{name} must be True or False, got {getattr(self, name)!r:.60}")
        if self.scaled is not None and not isinstance(self.scaled, bool):
            raise LatentsError(f"scaled must be True, False or None, got {self.scaled!r}")
        if self.dtype not in (None, *DTYPES):
            raise LatentsError(f"dtype must be {', '.join(DTYPES)}, got {self.dtype!r:.60}")
        for name in ("key", "member"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= _MAX_NAME):
                raise LatentsError(f"{name} must be a name, got {value!r:.60}")
        if self.member is not None:
            member = self.member.removeprefix("*").removeprefix(".").lower()
            object.__setattr__(self, "member", member)
        if self.dequantize is not None:
            object.__setattr__(self, "dequantize", _dequantization(self.dequantize))
        self.said()

    @classmethod
    def of(
        cls,
        space: str | Path | LatentSpace | None = None,
        scaled: bool | None = None,
        **options: Any,
    ) -> Reading:
        """As the constructor, of `Options`; a space is also a name or a file of one's own."""
        unknown = options.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"unknown options of reading: {', '.join(sorted(unknown))}")
        return cls(None if space is None else LatentSpace.of(space), scaled, **options)

    def said(self) -> Claims:
        """What is said of every file, but its space and scaling. Raises LatentsError."""
        size = Claims.parse({"height": self.height, "width": self.width}, pixels=self.pixels)
        return replace(size, layout=Claims.parse({"layout": self.layout}).layout)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.space is not None:
            LatentSpace.of(self.space)  # a space of one's own is known in this process, too


NOTHING_SAID = Reading()


def _dequantization(given: Any) -> tuple[float, float]:
    """Scale and zero, finite and plausible."""
    found = DEQUANTIZATIONS.get(given, given) if isinstance(given, str) else given
    if isinstance(found, str):
        try:
            found = tuple(float(part) for part in found.split(","))
        except ValueError:
            found = ()
    good = (
        isinstance(found, (tuple, list))
        and len(found) == 2
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in found)
        and all(math.isfinite(n) and abs(n) < 1e6 for n in found)
        and found[0] > 0
    )
    if not good:
        raise LatentsError(
            f"dequantize must be SCALE,ZERO, of (number - ZERO) * SCALE, or "
            f"{' or '.join(DEQUANTIZATIONS)}, got {given!r:.60}"
        )
    return float(found[0]), float(found[1])
