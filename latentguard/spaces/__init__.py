"""Latent spaces: what a latent tensor means, how its conventions convert, and what it looks like.

Reading order: data/ (one file a space) -> records.py (what a file says) -> space.py (LatentSpace,
and which are known) -> vae_config.py (from a pipeline's VAE) -> scaling.py (raw <-> scaled, the one
place) -> latents.py (a tensor that carries its convention) -> prediction.py
(noisy latents and the noise in them) -> arrays.py (the same as NumPy) ->
tokens.py (whether packed tokens can be of the size that is said) -> preview.py (RGB without a VAE)
-> statistics.py (the space from statistics). Only functions that touch tensors import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentguard.deprecated import former_names
from latentguard.spaces.arrays import LatentArray
from latentguard.spaces.latents import Latents, Layout
from latentguard.spaces.prediction import Prediction
from latentguard.spaces.preview import array_preview, rgb_preview
from latentguard.spaces.rgb import RGBView
from latentguard.spaces.space import (
    RECORDS,
    SCALINGS,
    SPACES,
    BatchNorm,
    LatentSpace,
    all_spaces,
    known_names,
    register,
)
from latentguard.spaces.statistics import Recognition, recognize

__all__ = [
    "RECORDS",
    "SCALINGS",
    "SPACES",
    "BatchNorm",
    "LatentArray",
    "LatentSpace",
    "Latents",
    "Layout",
    "Prediction",
    "RGBView",
    "Recognition",
    "all_spaces",
    "array_preview",
    "known_names",
    "recognize",
    "register",
    "rgb_preview",
]

if not TYPE_CHECKING:
    __getattr__ = former_names(__name__, {"recognise": "recognize"})
