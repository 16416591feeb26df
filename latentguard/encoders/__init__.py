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
from latentguard.encoders.hub import best_encoder, load_encoder

__all__ = [
    "Encoder",
    "EncoderBase",
    "Features",
    "Head",
    "best_encoder",
    "load_encoder",
    "strongest_view",
    "traits",
]
