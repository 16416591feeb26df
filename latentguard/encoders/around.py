"""An encoder over another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from latentguard.encoders.base import Encoder, EncoderBase, Head, traits

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from latentguard.spaces import Latents


class Around(EncoderBase):
    """What it is given, `inner`, in all but what a subclass says. `features` is the subclass's."""

    def __init__(self, inner: Encoder) -> None:
        self.inner = inner
        kind = traits(inner)
        self.sha256, self.space, self.dim = inner.sha256, inner.space, inner.dim
        self.needs_scaled, self.logit_scale = inner.needs_scaled, inner.logit_scale
        self.neutral_prompts, self.always_neutral = inner.neutral_prompts, inner.always_neutral
        self.uses_templates, self.min_coverage = inner.uses_templates, inner.min_coverage
        self.notes, self.text_norm = inner.notes, kind.text_norm
        self.fixed_size, self.pools, self.unscales = kind.fixed_size, kind.pools, kind.unscales
        self.crop_side, self.crop_lead = kind.crop_side, kind.crop_lead
        self.reads_crops, self.merges = kind.reads_crops, kind.merges

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def merge(self) -> float:  # type: ignore[override]
        """The share of the encoder's tokens that merge."""
        return traits(self.inner).merge

    @property
    def module(self) -> nn.Module | None:
        return traits(self.inner).module

    @property
    def head(self) -> Head:
        return self.inner.head

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def tokens_left(self, height: int, width: int) -> tuple[int, int]:
        return traits(self.inner).tokens_left(height, width)

    @contextmanager
    def published(self) -> Iterator[None]:
        with traits(self.inner).published():
            yield

    def encode_latents(self, latents: Latents) -> Tensor:
        return self.inner.encode_latents(latents)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.inner.encode_text(texts)

    def coverage(self, texts: Sequence[str]) -> Tensor:
        return self.inner.coverage(texts)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        self.inner.to(*args, **kwargs)
        return self
