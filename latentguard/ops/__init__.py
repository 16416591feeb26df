"""The operators at the two ends of the encoder: fused kernels where compiled, else PyTorch.

To import an operator's file is to register it; this is the one list of them.
"""

from __future__ import annotations

from latentguard.ops.concept_heatmap import concept_heatmap
from latentguard.ops.concept_similarity import concept_similarity
from latentguard.ops.null import null
from latentguard.ops.patch_embed import patch_embed

__all__ = ["concept_heatmap", "concept_similarity", "null", "patch_embed"]
