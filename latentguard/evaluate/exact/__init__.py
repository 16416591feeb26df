"""Pipelines whose outcome is known: the exact denoiser of a finite set of photos.

For a finite set of latents the ideal denoiser is known in closed form: E[x0 | x_t] is the mean of
the set, weighted with the Gaussian likelihoods of x_t (Karras et al. 2022, appendix B.3). In the
place of a trained network it makes the real pipelines, schedulers and noise of diffusers produce
trajectories that end on a photo of the set, so that blocking and steering have ground truth.

Reading order: photos.py (the set, prompts, outcomes) -> denoiser.py (the posterior and its
tempering) -> unet.py and transformer.py (stand-ins for the two networks) -> pipelines.py.

It is a test bench and no model of how early an image can be recognized: see
docs/early-detection.md.
"""

from __future__ import annotations

from latentguard.evaluate.exact.denoiser import ExactDenoiser, Tempering
from latentguard.evaluate.exact.photos import Outcome, Photos
from latentguard.evaluate.exact.pipelines import (
    exact_flux2_pipeline,
    exact_sdxl_pipeline,
    outcome,
    prompt,
)
from latentguard.evaluate.exact.transformer import ExactFlowTransformer
from latentguard.evaluate.exact.unet import ExactUNet

__all__ = [
    "ExactDenoiser",
    "ExactFlowTransformer",
    "ExactUNet",
    "Outcome",
    "Photos",
    "Tempering",
    "exact_flux2_pipeline",
    "exact_sdxl_pipeline",
    "outcome",
    "prompt",
]
