"""Features that concepts are learned on, and an encoder whose joint space holds them, too.

A learned head is linear in the features that a model has before its text space. To judge by it with
the operators that judge by prompts, `Widened` puts these features and a constant behind the model's
embedding. A prompt is then a row that is zero there, a learned head a row that is zero elsewhere,
and its bias stands at the constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.encoders.around import Around
from latentguard.encoders.base import Encoder, Features, Head, traits
from latentguard.encoders.crops import Crops
from latentguard.errors import LatentsError

if TYPE_CHECKING:
    from latentguard.spaces import Latents

CONSTANT = 16
"""Columns of the constant: one is 1, the others are zero and keep rows aligned."""


class Widened(Around):
    """Another encoder over [its embedding, its trunk's features, a constant], each of norm 1.

    Scores of prompts are the encoder's own up to rounding, and so are its name and digest. The
    trunk's features are there where the encoder has them (`EncoderBase.trunk_dim`); a head of any
    other encoder is over the embedding.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.joint_dim, self.trunk = encoder.dim, traits(encoder).trunk_dim
        self.dim = self.joint_dim + self.trunk + CONSTANT
        self.text_norm = float(2 + bool(self.trunk)) ** 0.5

    @property
    def head(self) -> Head:
        """None: rows are embeddings already."""
        return Head()

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
        *affine: Tensor | None,
        tokens: bool = True,
    ) -> Features:
        """As the encoder's `features`, in rows [.., dim] before their norm."""
        found = _own(self.inner, (latents, noise, alpha, sigma, *affine), tokens)
        return Features(
            self._wide(found.pooled), self._wide(found.tokens), found.grid, found.tiles, found.lead
        )

    def _wide(self, rows: Tensor) -> Tensor:
        if not self.trunk:
            rows = self.inner.head.embed(rows).to(rows.dtype)
            return torch.cat([rows, F.pad(torch.ones_like(rows[..., :1]), (0, CONSTANT - 1))], -1)
        # A cell of which the trunk knows nothing has features of norm 0. Its row is no shorter.
        nothing = rows[..., self.joint_dim :].norm(dim=-1, keepdim=True) < 0.5
        ends = torch.cat([torch.ones_like(rows[..., :1]), nothing.to(rows.dtype)], -1)
        return torch.cat([rows, F.pad(ends, (0, CONSTANT - 2))], -1)

    def encode_latents(self, latents: Latents) -> Tensor:
        """Unit-norm rows [B, dim]."""
        if latents.space.name != self.space:
            raise LatentsError(
                f"model {self.name} reads {self.space} latents, got {latents.space.name}"
            )
        tensor = latents.to_spatial().to_standard(self.needs_scaled).tensor
        found = self.features(tensor.to(self.device, self.dtype), tokens=False)
        return F.normalize(found.pooled[:: found.tiles].float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Rows [P, dim] of norm `text_norm`, so that cosines with images are the encoder's."""
        rows = self.inner.encode_text(texts)
        return F.pad(rows, (0, self.dim - self.joint_dim)) * self.text_norm

    def joint_row(self, embedding: Tensor) -> Tensor:
        """An embedding [dim of the encoder] as an image's row [dim], without anything else.

        Raises ValueError where it is of another size.
        """
        if embedding.shape != (self.joint_dim,):
            raise ValueError(
                f"the mean embedding must be [{self.joint_dim}], got {list(embedding.shape)}"
            )
        return F.pad(embedding.float(), (0, self.dim - self.joint_dim)) / self.text_norm

    def head_row(self, weight: Tensor, bias: float) -> Tensor:
        """A learned head, weight [F] and bias, as a row [dim] of a concept bank.

        Raises ValueError where the weight is not of this encoder's features.
        """
        wanted = self.trunk or self.joint_dim
        if weight.shape != (wanted,):
            raise ValueError(f"the head must be [{wanted}], got {list(weight.shape)}")
        row = torch.zeros(self.dim, dtype=torch.float32, device=self.device)
        begin = self.joint_dim if self.trunk else 0
        row[begin : begin + wanted] = weight.to(row)
        row[self.joint_dim + self.trunk] = bias
        return row * self.text_norm


def widened(encoder: Encoder) -> Encoder:
    """An encoder whose space holds heads that were learned from examples, too."""
    if isinstance(encoder, Crops):
        return Crops(widened(encoder.inner))
    return encoder if isinstance(encoder, Widened) else Widened(encoder)


def whole(encoder: Encoder) -> Encoder:
    """The encoder whose crops another one reads, or that one itself: crops are as it sees them."""
    return encoder.inner if isinstance(encoder, Crops) else encoder


def example_features(encoder: Encoder, latents: Latents, *, tokens: bool = False) -> Features:
    """The features that a concept is learned on, of images and, with `tokens`, of their cells.

    Returns pooled [B, F] and tokens [B, N, F] float32 of unit norm: what the trunk knows before its
    text space where the encoder has that (F is `trunk_dim`), else the embedding (F is `dim`). An
    image that is read in several views has its first, which is the whole.

    Raises LatentsError for latents of another space than the encoder's.
    """
    wide = widened(whole(encoder))
    assert isinstance(wide, Widened)
    found, part = _wide_features(wide, latents, tokens), _part(wide)
    pooled = found.pooled[:: found.tiles, part].float()
    return Features(pooled, found.tokens[..., part].float(), found.grid)


def example_rows(encoder: Encoder, latents: Latents) -> tuple[Tensor, Tensor]:
    """The pooled features of `example_features` [B, F], and the embeddings in the joint space
    [B, dim], from one pass; float32, unit norm.

    Raises LatentsError for latents of another space than the encoder's.
    """
    wide = widened(whole(encoder))
    assert isinstance(wide, Widened)
    found = _wide_features(wide, latents, tokens=False)
    rows = found.pooled[:: found.tiles].float()
    return rows[:, _part(wide)], rows[:, : wide.joint_dim]


def joint_embedding(encoder: Encoder, latents: Latents) -> Tensor:
    """Unit-norm embeddings [B, dim] float32 in the space of the encoder's prompts."""
    return encoder.encode_latents(latents).float()


def _part(wide: Widened) -> slice:
    begin = wide.joint_dim if wide.trunk else 0
    return slice(begin, begin + (wide.trunk or wide.joint_dim))


@torch.no_grad()
def _wide_features(wide: Widened, latents: Latents, tokens: bool) -> Features:
    if latents.space.name != wide.space:
        raise LatentsError(
            f"model {wide.name} reads {wide.space} latents, got {latents.space.name}"
        )
    tensor = latents.to_spatial().to_standard(wide.needs_scaled).tensor
    return wide.features(tensor.to(wide.device, wide.dtype), tokens=tokens)


def _own(encoder: Encoder, inputs: Sequence[Tensor | None], tokens: bool) -> Features:
    kind = traits(encoder)
    options: dict[str, Any] = {"tokens": tokens} if kind.pools else {}
    if kind.trunk_dim:
        options["trunk"] = True
    features: Any = encoder.features
    found: Features = features(*inputs, **options)
    return found
