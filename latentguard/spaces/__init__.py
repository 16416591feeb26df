"""Latent spaces: what a latent tensor means, how its conventions convert, and what it looks like.

Reading order: space.py (the table of spaces) -> scaling.py (raw <-> scaled, the one place) ->
latents.py (a tensor that carries its convention) -> prediction.py (noisy latents and the noise in
them) -> arrays.py (the same as NumPy) -> tokens.py
(whether packed tokens can be of the size that is said) -> preview.py (RGB without a VAE) ->
statistics.py (the space from statistics). Only functions that touch tensors import torch.
"""

from __future__ import annotations

from latentguard.spaces.arrays import LatentArray
from latentguard.spaces.latents import Latents, Layout
from latentguard.spaces.prediction import Prediction
from latentguard.spaces.preview import array_preview, rgb_preview
from latentguard.spaces.space import SCALINGS, SPACES, BatchNorm, LatentSpace
from latentguard.spaces.statistics import Recognition, recognise

__all__ = [
    "SCALINGS",
    "SPACES",
    "BatchNorm",
    "LatentArray",
    "LatentSpace",
    "Latents",
    "Layout",
    "Prediction",
    "Recognition",
    "array_preview",
    "recognise",
    "rgb_preview",
]
