"""concept_heatmap: concept_similarity's margin at every patch token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.ops import checks, library, reference
from latentguard.ops.concept_similarity import fake_projected

NAME = "concept_heatmap"


def concept_heatmap(
    tokens: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
    concepts: Tensor,
    segments: Tensor,
    contrast: Tensor,
    contrast_segments: Tensor,
) -> Tensor:
    """Where in the image each concept is: the margin of every patch token.

    Args:
        tokens: [B, N, D], float32, float16 or bfloat16 (float64: reference); patch tokens only.
        ln_weight, ln_bias, eps, projection, concepts, segments, contrast, contrast_segments:
            as in `concept_similarity`.

    Returns:
        margin [B, K, N] float32: reshape N to the grid for a map. (float64 tokens give float64.)

    Raises:
        RuntimeError: a dtype, device or shape other than these; it names the argument.
    """
    head = (ln_weight, ln_bias, eps, projection)
    bank = (concepts, segments, contrast, contrast_segments)
    weights = (ln_weight, ln_bias, projection, concepts, contrast)
    if library.use_kernels(tokens, *weights) and library.fits(tokens, concepts):
        save = torch.is_grad_enabled() and tokens.requires_grad
        margin: Tensor = torch.ops.latentguard.concept_heatmap(tokens, *head, *bank, save)[0]
        return margin
    return _reference(tokens, *head, *bank)[0]


def _reference(
    tokens: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
    concepts: Tensor,
    segments: Tensor,
    contrast: Tensor,
    contrast_segments: Tensor,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.shape(NAME, "tokens", tokens, None, None, None)
    banks = {"concepts": concepts, "contrast": contrast}
    ranges = {"segments": segments, "contrast_segments": contrast_segments}
    checks.concepts(NAME, "tokens", tokens, ln_weight, ln_bias, projection, banks, ranges)
    head = (ln_weight, ln_bias, eps, projection)
    bank = (concepts, segments, contrast, contrast_segments)
    return reference.concept_heatmap(tokens, *head, *bank, save)


def _fake(
    tokens: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
    concepts: Tensor,
    segments: Tensor,
    contrast: Tensor,
    contrast_segments: Tensor,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    shape = (tokens.shape[0], segments.shape[0], tokens.shape[1])
    best = [tokens.new_empty(shape if save else 0, dtype=torch.int64) for _ in range(2)]
    margin = tokens.new_empty(shape, dtype=real)
    return margin, best[0], best[1], fake_projected(tokens, concepts, save)


def _backward_fake(grad: Tensor, tokens: Tensor, *rest: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


library.register(NAME, _reference, _fake)
library.register(NAME + "_backward", reference.concept_heatmap_backward, _backward_fake)
