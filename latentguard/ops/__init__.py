"""The operators at the two ends of the encoder: fused kernels where compiled, else PyTorch."""

from __future__ import annotations

from latentguard.ops.concept_heatmap import concept_heatmap
from latentguard.ops.concept_similarity import concept_similarity
from latentguard.ops.patch_embed import patch_embed

__all__ = ["concept_heatmap", "concept_similarity", "patch_embed"]
