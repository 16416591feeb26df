"""Latent spaces: what a latent tensor means, how its conventions convert, and what it looks like.

Reading order: space.py (the table of spaces and their conversions) -> latents.py (a tensor that
carries its convention) -> preview.py (RGB without a VAE) -> statistics.py (the space from
statistics). Only functions that touch tensors import torch; the table does not need it.
"""

from __future__ import annotations

from latentguard.spaces.latents import Latents, Layout
from latentguard.spaces.preview import rgb_preview
from latentguard.spaces.space import SPACES, BatchNorm, LatentSpace
from latentguard.spaces.statistics import Recognition, recognise

__all__ = [
    "SPACES",
    "BatchNorm",
    "LatentSpace",
    "Latents",
    "Layout",
    "Recognition",
    "recognise",
    "rgb_preview",
]
