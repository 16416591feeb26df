"""concept_similarity: from pooled features to each concept's margin and probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.ops import checks, library, onnx, reference
from latentguard.ops.arguments import Bank, Head, Saved, Weights, text

NAME = "concept_similarity"
# Shared memory beside the rows, as ConceptMemory in csrc/cuda/concepts.h adds it up.
_BESIDE = 41_344


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

    u = normalize(layer_norm(features) @ projection); margin = max over the concept's prompts of
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
    head = Head(ln_weight, ln_bias, eps, projection)
    bank = Bank(concepts, segments, contrast, contrast_segments)
    if use_kernels(features, head, bank):
        save = torch.is_grad_enabled() and features.requires_grad
        out = torch.ops.latentguard.concept_similarity(features, *head, *bank, logit_scale, save)
    else:
        out = _reference(features, head, bank, logit_scale)
    probability, margin, prompt, *_ = out
    return probability, margin, prompt


def use_kernels(rows: Tensor, head: Head, bank: Bank) -> bool:
    """Whether a call goes to the operator: see `library.use_kernels` and `library.fits`."""
    weights = (head.ln_weight, head.ln_bias, head.projection, bank.concepts, bank.contrast)
    widest = max(rows.shape[-1], bank.concepts.shape[-1])
    return library.use_kernels(rows, *weights) and library.fits(rows.device, widest, _BESIDE)


def _reference(
    features: Tensor, head: Head, bank: Bank, logit_scale: float, save: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.shape(NAME, "features", features, None, None)
    checks.concepts(NAME, "features", features, head, bank)
    return reference.concept_similarity(features, *head, *bank, logit_scale, save)


def _fake(
    features: Tensor, head: Head, bank: Bank, logit_scale: float, save: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (features.shape[0], bank.segments.shape[0])
    real = torch.float64 if features.dtype == torch.float64 else torch.float32
    floats = [features.new_empty(shape, dtype=real) for _ in range(2)]
    indices = [features.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    return floats[0], floats[1], indices[0], indices[1], fake_projected(features, bank, save)


def fake_projected(features: Tensor, bank: Bank, save: bool) -> Tensor:
    """Shape of the saved rows: [..., E], or [0] where nothing is saved."""
    return features.new_empty((*features.shape[:-1], bank.concepts.shape[1]) if save else 0)


def _backward_fake(
    grad_probability: Tensor | None, grad_margin: Tensor | None, features: Tensor, *rest: Any
) -> Tensor:
    return features.new_empty(features.shape)


def onnx_scores(op: Any, features: Any, head: Head, bank: Bank) -> tuple[Any, Any, Any, Any]:
    """Margin, best prompt and best contrast prompt [..., K], projected rows [..., E]."""
    x = onnx.up(op, features)
    if head.ln_weight is not None:
        x = onnx.layer_norm(op, x, head.ln_weight, head.ln_bias, head.eps)
    if head.projection is not None:
        x = op.MatMul(x, onnx.up(op, head.projection))
    norm = op.ReduceL2(x, onnx.ints(op, -1), keepdims=1)
    unit = op.Div(x, op.Max(norm, op.Constant(value_float=reference.NORM_FLOOR)))
    turned = [op.Transpose(onnx.up(op, b), perm=[1, 0]) for b in (bank.concepts, bank.contrast)]
    value, prompt = _onnx_best(op, op.MatMul(unit, turned[0]), bank.concepts, bank.segments)
    against, contrast_prompt = _onnx_best(
        op, op.MatMul(unit, turned[1]), bank.contrast, bank.contrast_segments
    )
    return op.Sub(value, against), prompt, contrast_prompt, x


def _onnx_best(op: Any, cosine: Any, bank: Any, segments: Any) -> tuple[Any, Any]:
    """Largest cosine [..., K] in each segment and where it stands; NaN and -1 where none is.

    All that depends on the bank [P, E] and its segments alone is a constant once they are.
    """
    size = op.Shape(bank, start=0, end=1)
    scalar = op.Squeeze(size, onnx.ints(op, 0))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    column = op.Unsqueeze(op.Range(zero, scalar, one), onnx.ints(op, 0))
    ranges = op.Cast(segments, to=onnx.INT64)
    begin = op.Gather(ranges, onnx.ints(op, 0), axis=1)
    end = op.Gather(ranges, onnx.ints(op, 1), axis=1)
    outside = op.Or(op.Less(column, begin), op.GreaterOrEqual(column, end))
    lowest = op.Constant(value_float=float("-inf"))
    masked = op.Where(outside, lowest, op.Unsqueeze(cosine, onnx.ints(op, -2)))
    value = op.ReduceMax(masked, onnx.ints(op, -1), keepdims=0)
    index = op.ArgMax(masked, axis=-1, keepdims=0)
    # A maximum may pass over NaN; this sum does not.
    nothing = op.Mul(cosine, op.Constant(value_float=0.0))
    value = op.Add(value, op.ReduceSum(nothing, onnx.ints(op, -1), keepdims=1))
    wrong = op.Or(op.Less(begin, zero), op.Or(op.Greater(end, size), op.GreaterOrEqual(begin, end)))
    wrong = op.Squeeze(wrong, onnx.ints(op, 1))
    value = op.Where(wrong, op.Constant(value_float=float("nan")), value)
    return value, op.Where(wrong, op.Constant(value_int=-1), index)


def _onnx(
    features: Any, head: Head, bank: Bank, logit_scale: float, save: bool = False
) -> tuple[Any, Any, Any, Any, Any]:
    op = onnx.operators()
    margin, prompt, against, projected = onnx_scores(op, features, head, bank)
    scale = op.Constant(value_float=float(logit_scale))
    if save:
        rows = onnx.down(op, op.Identity(projected), features)
    else:
        rows = onnx.nothing(op, onnx.kind(features))
    return op.Sigmoid(op.Mul(margin, scale)), margin, prompt, against, rows


library.register(
    NAME,
    f"(Tensor features, {text(Head)}, {text(Bank)}, float logit_scale, bool save=False) -> "
    f"(Tensor probability, Tensor margin, {text(Saved)})",
    _reference,
    _fake,
    _onnx,
)
library.register(
    NAME + "_backward",
    f"(Tensor? grad_probability, Tensor? grad_margin, Tensor features, {text(Weights)}, "
    f"Tensor probability, {text(Saved)}, float logit_scale) -> Tensor",
    reference.concept_similarity_backward,
    _backward_fake,
)
