"""Latents to embeddings: one Encoder protocol, and `load_encoder` for all that follow it.

Names are imported when they are first used: the catalog and the text side of the packaged models
work without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentguard.encoders.base import (
        Encoder,
        EncoderBase,
        Features,
        Head,
        strongest_view,
        traits,
    )
    from latentguard.encoders.hub import best_encoder, load_encoder, needs_space

_HOME = {
    "Encoder": "base",
    "EncoderBase": "base",
    "Features": "base",
    "Head": "base",
    "best_encoder": "hub",
    "load_encoder": "hub",
    "needs_space": "hub",
    "strongest_view": "base",
    "traits": "base",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
