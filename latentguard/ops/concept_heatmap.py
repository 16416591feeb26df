"""concept_heatmap: concept_similarity's margin at every patch token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.ops import checks, library, reference
from latentguard.ops.concept_similarity import refuse_weights

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
        margin: Tensor = torch.ops.latentguard.concept_heatmap(tokens, *head, *bank)
        return margin
    return _reference(tokens, *head, *bank)


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
) -> Tensor:
    checks.shape(NAME, "tokens", tokens, None, None, None)
    banks = {"concepts": concepts, "contrast": contrast}
    ranges = {"segments": segments, "contrast_segments": contrast_segments}
    checks.concepts(NAME, "tokens", tokens, ln_weight, ln_bias, projection, banks, ranges)
    head = (ln_weight, ln_bias, eps, projection)
    return reference.concept_heatmap(tokens, *head, concepts, segments, contrast, contrast_segments)


def _fake(
    tokens: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
    concepts: Tensor,
    segments: Tensor,
    *rest: Any,
) -> Tensor:
    real = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return tokens.new_empty((tokens.shape[0], segments.shape[0], tokens.shape[1]), dtype=real)


def _backward_fake(grad: Tensor, tokens: Tensor, *rest: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, ln_weight, ln_bias, eps, projection, *bank = inputs
    refuse_weights(NAME, ctx.needs_input_grad)
    ctx.eps = eps
    ctx.save_for_backward(tokens, ln_weight, ln_bias, projection, *bank)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, ln_weight, ln_bias, projection, *bank = ctx.saved_tensors
    inner = torch.ops.latentguard.concept_heatmap_backward(
        grad.contiguous(), tokens, ln_weight, ln_bias, ctx.eps, projection, *bank
    )
    return (inner, *(None,) * 8)


library.register(NAME, _reference, _fake, _backward, _setup)
library.register(NAME + "_backward", reference.concept_heatmap_backward, _backward_fake)
