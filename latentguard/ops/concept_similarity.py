"""concept_similarity: from pooled features to each concept's margin and probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.ops import checks, library, reference

NAME = "concept_similarity"


def concept_similarity(
    features: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
    concepts: Tensor,
    segments: Tensor,
    contrast: Tensor,
    contrast_segments: Tensor,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine of features to each concept's best prompt, against its best contrast prompt.

    u = normalise(layer_norm(features) @ projection); margin = max over the concept's prompts of
    u . prompt, minus the same over its contrast prompts; probability = sigmoid(logit_scale *
    margin). Ties go to the lowest index. The [B, P] matrix of cosines never reaches memory.
    Accumulated in float32; differentiable in `features` through fused kernels, in the other
    arguments through the PyTorch reference.

    Args:
        features: [B, D], float32, float16 or bfloat16 (float64: reference).
        ln_weight: [D] of the same dtype, or None for no layer norm.
        ln_bias: [D], given together with `ln_weight`.
        eps: added to the variance in the layer norm.
        projection: [D, E] of the same dtype, or None (then E is D).
        concepts: [P, E] of the same dtype, prompt embeddings of unit norm.
        segments: [K, 2] int32: concept k has prompts begin to end - 1 of `concepts`. A range that
            is empty or leaves the bank yields NaN and prompt -1, for the caller to fail closed.
        contrast: [Q, E] of the same dtype, contrast prompt embeddings of unit norm.
        contrast_segments: [K, 2] int32, ranges of `contrast`; concepts may share them.
        logit_scale: what the margin is multiplied by before the sigmoid.

    Returns:
        probability [B, K] float32, margin [B, K] float32, best_prompt [B, K] int64: the row of
        `concepts` that reached the maximum. (float64 features give float64.)

    Raises:
        RuntimeError: a dtype, device or shape other than these; it names the argument.
    """
    head = (ln_weight, ln_bias, eps, projection)
    bank = (concepts, segments, contrast, contrast_segments)
    weights = (ln_weight, ln_bias, projection, concepts, contrast)
    if library.use_kernels(features, *weights) and library.fits(features, concepts):
        save = torch.is_grad_enabled() and features.requires_grad
        out = torch.ops.latentguard.concept_similarity(features, *head, *bank, logit_scale, save)
    else:
        out = _reference(features, *head, *bank, logit_scale)
    probability, margin, prompt, *_ = out
    return probability, margin, prompt


def _reference(
    features: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
    concepts: Tensor,
    segments: Tensor,
    contrast: Tensor,
    contrast_segments: Tensor,
    logit_scale: float,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.shape(NAME, "features", features, None, None)
    banks = {"concepts": concepts, "contrast": contrast}
    ranges = {"segments": segments, "contrast_segments": contrast_segments}
    checks.concepts(NAME, "features", features, ln_weight, ln_bias, projection, banks, ranges)
    head = (ln_weight, ln_bias, eps, projection)
    bank = (concepts, segments, contrast, contrast_segments)
    return reference.concept_similarity(features, *head, *bank, logit_scale, save)


def _fake(
    features: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
    concepts: Tensor,
    segments: Tensor,
    contrast: Tensor,
    contrast_segments: Tensor,
    logit_scale: float,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (features.shape[0], segments.shape[0])
    real = torch.float64 if features.dtype == torch.float64 else torch.float32
    floats = [features.new_empty(shape, dtype=real) for _ in range(2)]
    indices = [features.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    return floats[0], floats[1], indices[0], indices[1], fake_projected(features, concepts, save)


def fake_projected(features: Tensor, concepts: Tensor, save: bool) -> Tensor:
    """Shape of the saved rows: [..., E], or [0] where nothing is saved."""
    return features.new_empty((*features.shape[:-1], concepts.shape[1]) if save else 0)


def _backward_fake(
    grad_probability: Tensor | None, grad_margin: Tensor | None, features: Tensor, *rest: Any
) -> Tensor:
    return features.new_empty(features.shape)


library.register(NAME, _reference, _fake)
library.register(NAME + "_backward", reference.concept_similarity_backward, _backward_fake)
