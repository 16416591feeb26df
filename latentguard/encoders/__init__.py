"""Latents to embeddings: one Encoder protocol, and `load_encoder` for all that follow it."""

from __future__ import annotations

from latentguard.encoders.base import (
    Encoder,
    EncoderBase,
    Features,
    Head,
    strongest_view,
    traits,
)
from latentguard.encoders.hub import best_encoder, load_encoder, needs_space

__all__ = [
    "Encoder",
    "EncoderBase",
    "Features",
    "Head",
    "best_encoder",
    "load_encoder",
    "needs_space",
    "strongest_view",
    "traits",
]
