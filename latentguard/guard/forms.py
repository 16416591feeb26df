"""Forms in which pipelines hold latents: where channels, rows and columns lie among the axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Size = tuple[int, int]
"""Height and width in latent cells."""

_SPATIAL = "bchpwq"  # the axes of [B, C, H, W], rows and columns split into patches


@dataclass(frozen=True)
class Form:
    """One order in which a tensor holds the numbers of latents [B, C, H, W].

    pattern: its axes, those in brackets joined to one. b is the batch, c the channels, h and w the
        rows and columns of patches, p and q the rows and columns of cells in a patch; 1 is an axis
        of one, such as the only frame of an image.
    patch: cells along each side of a patch.
    """

    pattern: str
    patch: int = 1

    def __str__(self) -> str:
        if self.patch == 1:
            return f"[{self.pattern}]"
        return f"[{self.pattern}] with patches of {self.patch}x{self.patch} cells"

    @property
    def _axes(self) -> list[str]:
        return [joined or one for joined, one in re.findall(r"\((.*?)\)|(\S)", self.pattern)]

    @property
    def _letters(self) -> list[str]:
        return [letter for axis in self._axes for letter in axis if letter.isalpha()]

    @property
    def tells_size(self) -> bool:
        """Whether a tensor of this form says itself how many rows and columns it has."""
        return "h" in self._axes

    def fits(self, shape: Sequence[int], channels: int, size: Size | None = None) -> bool:
        """Whether latents of that many channels can have this shape.

        size: of the images, where it is known; without it tokens may be of any number.
        """
        axes = self._axes
        if len(shape) != len(axes):
            return False
        free = () if self.tells_size or size is not None else ("hw",)
        known = self._lengths(shape, channels, size)
        return all(
            axis in free or length == _product(known, axis)
            for axis, length in zip(axes, shape, strict=True)
        )

    def spatial(self, tensor: Tensor, channels: int, size: Size | None) -> Tensor:
        """A tensor that fits as [B, C, H, W]; size is needed where the form does not tell it."""
        known = self._lengths(tensor.shape, channels, size)
        letters = self._letters
        split = tensor.reshape([known[letter] for letter in letters])
        order = [letters.index(letter) for letter in _SPATIAL if letter in letters]
        height, width = (known[side] * self.patch for side in "hw")
        return split.permute(order).reshape(known["b"], channels, height, width)

    def restored(self, spatial: Tensor) -> Tensor:
        """The inverse of `spatial`: [B, C, H, W] in this form."""
        batch, channels, height, width = spatial.shape
        size = (height, width)
        known = {"b": batch, **self._patches(size), "c": channels}
        letters = [letter for letter in _SPATIAL if letter in self._letters]
        split = spatial.reshape([known[letter] for letter in letters])
        ordered = split.permute([letters.index(letter) for letter in self._letters])
        return ordered.reshape([_product(known, axis) for axis in self._axes])

    def _lengths(self, shape: Sequence[int], channels: int, size: Size | None) -> dict[str, int]:
        axes = self._axes
        if self.tells_size:
            rows, columns = (shape[axes.index(side)] for side in "hw")
            size = (rows * self.patch, columns * self.patch)
        patches = {} if size is None else self._patches(size)
        inner = {"c": channels, "p": self.patch, "q": self.patch}
        return {"b": shape[axes.index("b")], **inner, **patches}

    def _patches(self, size: Size) -> dict[str, int]:
        height, width = size
        patch = self.patch
        return {"h": height // patch, "w": width // patch, "p": patch, "q": patch}


def _product(lengths: dict[str, int], axis: str) -> int:
    product = 1
    for letter in axis:
        product *= 1 if letter == "1" else lengths[letter]
    return product


SPATIAL = Form("b c h w")
FRAMED = Form("b c 1 h w")
"""As video models hold a single image."""
CHANNELS_LAST = Form("b 1 h w c")


def tokens(patch: int) -> Form:
    """Tokens in rows, each with the channels of a patch one after another, as FLUX.1 packs them."""
    return Form("b (hw) (cpq)" if patch > 1 else "b (hw) c", patch)


def tokens_by_cell(patch: int) -> Form:
    """Tokens in rows, each with the cells of a patch one after another, as Ideogram 4 has them."""
    return Form("b (hw) (pqc)", patch)


def patches(patch: int) -> Form:
    """A grid of patches, each in one long channel axis, as ERNIE-Image denoises them."""
    return Form("b (cpq) h w", patch)
