"""An encoder that reads an image twice: whole, and in crops of the size that it was trained on.

A small object in a large image is a few cells of the one view that the whole image is. In a crop it
fills what the encoder sees. Crops also see more that can be mistaken, one chance each, so a crop's
margin counts less by a lead that it has to have, and that grows with the number of crops
(docs/views.md has the measurements).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentguard.encoders.around import Around
from latentguard.encoders.base import Encoder, Features, traits
from latentguard.encoders.catalog import VIEWS
from latentguard.errors import ModelError

PER_AXIS = 5
"""Crops along a side at most: those of larger images are larger."""
_MULTIPLE = 4
_MEASURED, _GROWTH = 9, 0.1
"""The crops at which an encoder's `crop_lead` was measured, and what more of them add to it by
their logarithm: the largest of many margins grows about so. Measured at 9 and at 25."""


class Crops(Around):
    """Another encoder over the whole image and its crops; an image's score is its best view's.

    Crops are squares of the encoder's trained side that overlap by half where at most `PER_AXIS`
    along a side do, and by less where more would be needed; together they cover the image. Images
    of up to the trained side have no crops, and score as with the encoder itself.

    `Features.pooled` has the whole first, then the crops row by row; tokens and grid are the
    whole's.

    Raises ModelError for an encoder whose crops were not measured (`EncoderBase.crop_lead`).
    """

    def __init__(self, encoder: Encoder) -> None:
        kind = traits(encoder)
        if kind.crop_side is None:
            raise ModelError(
                f"{encoder.name} is not read in crops: no lead was measured for it, as it is for "
                "nano-flux2"
            )
        super().__init__(encoder)
        self.side, self._lead = kind.crop_side, kind.crop_lead
        self.fixed_size = self.reads_crops = self.pools = True
        self.unscales, self.crop_side = False, None
        self.notes = f"{encoder.notes} Read whole and in crops of {self.side} cells."

    @property
    def name(self) -> str:
        """The encoder's, with `+views=crops` behind it."""
        return f"{self.inner.name}{VIEWS}crops"

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
        *,
        tokens: bool = True,
    ) -> Features:
        """As `Encoder.features`; `tiles` counts the views, `lead` is what a crop has to have."""
        boxes = boxes_of(latents.shape[-2], latents.shape[-1], self.side)
        pools = traits(self.inner).pools
        wanted: dict[str, Any] = {"tokens": tokens} if pools else {}
        alone: dict[str, Any] = {"tokens": False} if pools else {}
        whole = self.inner.features(latents, noise, alpha, sigma, **wanted)
        if not boxes:
            return whole
        count = len(boxes)
        crops = self.inner.features(
            _crops(latents, boxes),
            None if noise is None else _crops(noise, boxes),
            None if alpha is None else alpha.repeat_interleave(count),
            None if sigma is None else sigma.repeat_interleave(count),
            **alone,
        )
        own = crops.pooled.reshape(-1, count, crops.pooled.shape[-1])
        pooled = torch.cat([whole.pooled[:, None], own], 1).flatten(0, 1)
        return Features(pooled, whole.tokens, whole.grid, 1 + count, lead=self.lead(count))

    def lead(self, count: int) -> float:
        """What the margin of one of so many crops has to have above what the whole needs."""
        return self._lead + _GROWTH * max(0.0, math.log(count / _MEASURED))


Box = tuple[int, int, int, int]
"""Rows from, to, columns from, to, in latent cells."""


def boxes_of(height: int, width: int, side: int) -> list[Box]:
    """The crops of latents [.., height, width]; none where the whole is no larger than one."""
    if height <= side and width <= side:
        return []
    largest = max(height, width)
    # At most PER_AXIS along the longer side, without a gap between them.
    side = max(side, _MULTIPLE * math.ceil(largest / PER_AXIS / _MULTIPLE))
    rows, columns = (_spans(n, side) for n in (height, width))
    return [(*row, *column) for row in rows for column in columns]


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    """Equal spans that cover a length, overlapping by half of `side` where that is few enough."""
    if length <= side:
        return [(0, length)]
    count = min(PER_AXIS, 1 + math.ceil((length - side) / (side / 2)))
    starts = [index * (length - side) // (count - 1) for index in range(count)]
    return [(start, start + side) for start in starts]


def _crops(tensor: Tensor, boxes: Sequence[Box]) -> Tensor:
    """[B, C, H, W] to [B * crops, C, h, w], an image's crops next to each other."""
    cut = [tensor[..., top:bottom, left:right] for top, bottom, left, right in boxes]
    return torch.stack(cut, 1).flatten(0, 1)
