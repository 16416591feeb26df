"""concept_heatmap: concept_similarity's margin at every patch token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.ops import checks, library, onnx, reference
from latentguard.ops.arguments import Bank, Head, Saved, Weights, text
from latentguard.ops.concept_similarity import fake_projected, onnx_scores, use_kernels

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
    head = Head(ln_weight, ln_bias, eps, projection)
    bank = Bank(concepts, segments, contrast, contrast_segments)
    if use_kernels(tokens, head, bank):
        save = torch.is_grad_enabled() and tokens.requires_grad
        margin: Tensor = torch.ops.latentguard.concept_heatmap(tokens, *head, *bank, save)[0]
        return margin
    return _reference(tokens, head, bank)[0]


def _reference(
    tokens: Tensor, head: Head, bank: Bank, save: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.shape(NAME, "tokens", tokens, None, None, None)
    checks.concepts(NAME, "tokens", tokens, head, bank)
    return reference.concept_heatmap(tokens, *head, *bank, save)


def _fake(
    tokens: Tensor, head: Head, bank: Bank, save: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    shape = (tokens.shape[0], bank.segments.shape[0], tokens.shape[1])
    best = [tokens.new_empty(shape if save else 0, dtype=torch.int64) for _ in range(2)]
    margin = tokens.new_empty(shape, dtype=real)
    return margin, best[0], best[1], fake_projected(tokens, bank, save)


def _backward_fake(grad: Tensor, tokens: Tensor, *rest: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _onnx(tokens: Any, head: Head, bank: Bank, save: bool = False) -> tuple[Any, Any, Any, Any]:
    op = onnx.operators()
    margin, prompt, against, projected = onnx_scores(op, tokens, head, bank)
    margin = op.Transpose(margin, perm=[0, 2, 1])
    if not save:
        kinds = (onnx.INT64, onnx.INT64, onnx.kind(tokens))
        return margin, *(onnx.nothing(op, kind) for kind in kinds)
    best = (op.Transpose(index, perm=[0, 2, 1]) for index in (prompt, against))
    return margin, *best, onnx.down(op, op.Identity(projected), tokens)


library.register(
    NAME,
    f"(Tensor tokens, {text(Head)}, {text(Bank)}, bool save=False) -> "
    f"(Tensor margin, {text(Saved)})",
    _reference,
    _fake,
    _onnx,
)
library.register(
    NAME + "_backward",
    f"(Tensor grad, Tensor tokens, {text(Weights)}, {text(Saved)}) -> Tensor",
    reference.concept_heatmap_backward,
    _backward_fake,
)
