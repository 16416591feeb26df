"""The operators in standard ONNX operators, for torch.onnx.export's custom_translation_table.

    torch.onnx.export(model, args, dynamo=True, custom_translation_table=translations())

Everything is computed in float32, as the kernels do. The batch may be dynamic, and so may height
and width where the positional embedding follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from latentguard.errors import ModelError
from latentguard.ops.reference import NORM_FLOOR

OPSET = 18
_FLOAT, _INT64, _BOOL = 1, 7, 9


def _operators() -> Any:
    from onnxscript import opset18

    return opset18


def _up(op: Any, value: Any) -> Any:
    """A value as float32; nothing is added where it is float32 already."""
    if value is None or (value.dtype is not None and int(value.dtype) == _FLOAT):
        return value
    return op.Cast(value, to=_FLOAT)


def _down(op: Any, value: Any, like: Any) -> Any:
    return value if int(like.dtype) == _FLOAT else op.CastLike(value, like)


def _kind(value: Any) -> int:
    return int(value.dtype)


def _layer_norm(op: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    # The operator has three outputs; mean and deviation are not used.
    out = op.LayerNormalization(x, _up(op, weight), _up(op, bias), axis=-1, epsilon=eps)
    return out[0] if isinstance(out, tuple) else out


def _ints(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _per_channel(op: Any, vector: Any, channels: int, latents: Any) -> Any:
    if vector.shape[0] == channels:
        return op.Reshape(vector, _ints(op, 1, channels, 1, 1))
    cells = op.Reshape(vector, _ints(op, 1, channels, 2, 2))
    half = op.Div(op.Shape(latents, start=2), _ints(op, 2))
    return op.Tile(cells, op.Concat(_ints(op, 1, 1), half, axis=0))


def _patch_embed(
    latents: Any,
    weight: Any,
    class_embedding: Any,
    positional_embedding: Any,
    ln_weight: Any,
    ln_bias: Any,
    eps: float,
    scale: Any = None,
    shift: Any = None,
    noise: Any = None,
    alpha: Any = None,
    sigma: Any = None,
) -> Any:
    op = _operators()
    dim, channels, patch, _ = (int(size) for size in weight.shape)
    per_image = _ints(op, -1, 1, 1, 1)
    x = _up(op, latents)
    if noise is not None:
        x = op.Sub(x, op.Mul(op.Reshape(_up(op, sigma), per_image), _up(op, noise)))
    if alpha is not None:
        x = op.Div(x, op.Reshape(_up(op, alpha), per_image))
    if scale is not None:
        x = op.Mul(x, _per_channel(op, _up(op, scale), channels, latents))
    if shift is not None:
        x = op.Add(x, _per_channel(op, _up(op, shift), channels, latents))
    x = op.Conv(x, _up(op, weight), strides=[patch, patch])
    x = op.Transpose(op.Reshape(x, _ints(op, 0, dim, -1)), perm=[0, 2, 1])
    batch = op.Shape(latents, start=0, end=1)
    size = op.Concat(batch, _ints(op, 1, dim), axis=0)
    first = op.Expand(op.Reshape(_up(op, class_embedding), _ints(op, 1, 1, dim)), size)
    x = op.Add(op.Concat(first, x, axis=1), _up(op, positional_embedding))
    return _down(op, _layer_norm(op, x, ln_weight, ln_bias, eps), latents)


def _best(op: Any, cosine: Any, bank: Any, segments: Any) -> tuple[Any, Any]:
    """Largest cosine [..., K] in each segment and where it stands; NaN and -1 where none is.

    All that depends on the bank [P, E] and its segments alone is a constant once they are.
    """
    size = op.Shape(bank, start=0, end=1)
    scalar = op.Squeeze(size, _ints(op, 0))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    column = op.Unsqueeze(op.Range(zero, scalar, one), _ints(op, 0))
    ranges = op.Cast(segments, to=_INT64)
    begin = op.Gather(ranges, _ints(op, 0), axis=1)
    end = op.Gather(ranges, _ints(op, 1), axis=1)
    outside = op.Or(op.Less(column, begin), op.GreaterOrEqual(column, end))
    lowest = op.Constant(value_float=float("-inf"))
    masked = op.Where(outside, lowest, op.Unsqueeze(cosine, _ints(op, -2)))
    value = op.ReduceMax(masked, _ints(op, -1), keepdims=0)
    index = op.ArgMax(masked, axis=-1, keepdims=0)
    # A maximum may pass over NaN; this sum does not.
    nothing = op.Mul(cosine, op.Constant(value_float=0.0))
    value = op.Add(value, op.ReduceSum(nothing, _ints(op, -1), keepdims=1))
    wrong = op.Or(op.Less(begin, zero), op.Or(op.Greater(end, size), op.GreaterOrEqual(begin, end)))
    wrong = op.Squeeze(wrong, _ints(op, 1))
    value = op.Where(wrong, op.Constant(value_float=float("nan")), value)
    return value, op.Where(wrong, op.Constant(value_int=-1), index)


def _nothing(op: Any, dtype: int) -> Any:
    """An empty tensor, as the operators give where nothing is saved for a backward."""
    return op.Cast(op.ConstantOfShape(_ints(op, 0)), to=dtype)


def _scores(
    features: Any,
    ln_weight: Any,
    ln_bias: Any,
    eps: float,
    projection: Any,
    concepts: Any,
    segments: Any,
    contrast: Any,
    contrast_segments: Any,
) -> tuple[Any, Any, Any, Any]:
    """Margin, best prompt and best contrast prompt [..., K], projected rows [..., E]."""
    op = _operators()
    x = _up(op, features)
    if ln_weight is not None:
        x = _layer_norm(op, x, ln_weight, ln_bias, eps)
    if projection is not None:
        x = op.MatMul(x, _up(op, projection))
    norm = op.ReduceL2(x, _ints(op, -1), keepdims=1)
    unit = op.Div(x, op.Max(norm, op.Constant(value_float=NORM_FLOOR)))
    banks = [op.Transpose(_up(op, bank), perm=[1, 0]) for bank in (concepts, contrast)]
    value, prompt = _best(op, op.MatMul(unit, banks[0]), concepts, segments)
    against, contrast_prompt = _best(op, op.MatMul(unit, banks[1]), contrast, contrast_segments)
    return op.Sub(value, against), prompt, contrast_prompt, x


def _concept_similarity(
    features: Any, *arguments: Any, save: bool = False
) -> tuple[Any, Any, Any, Any, Any]:
    op = _operators()
    *rest, logit_scale = arguments[:9]
    save = bool(arguments[9]) if len(arguments) > 9 else save
    margin, prompt, against, projected = _scores(features, *rest)
    scale = op.Constant(value_float=float(logit_scale))
    rows = _down(op, op.Identity(projected), features) if save else _nothing(op, _kind(features))
    return op.Sigmoid(op.Mul(margin, scale)), margin, prompt, against, rows


def _concept_heatmap(tokens: Any, *arguments: Any, save: bool = False) -> tuple[Any, Any, Any, Any]:
    op = _operators()
    save = bool(arguments[8]) if len(arguments) > 8 else save
    margin, prompt, against, projected = _scores(tokens, *arguments[:8])
    margin = op.Transpose(margin, perm=[0, 2, 1])
    if not save:
        nothing = (_nothing(op, dtype) for dtype in (_INT64, _INT64, _kind(tokens)))
        return margin, *nothing
    best = (op.Transpose(index, perm=[0, 2, 1]) for index in (prompt, against))
    return margin, *best, _down(op, op.Identity(projected), tokens)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Plain attention [..., N, D] with the key transposed once; a mask is added to the logits.

    torch.onnx's own translation goes through two reshapes of a shape computed at run time, which
    no engine fuses.
    """
    chosen = attn_mask is not None and _kind(attn_mask) == _BOOL
    if chosen or dropout_p or is_causal or enable_gqa:
        raise ModelError(
            "attention is exported without dropout, and with masks that are added to its logits"
        )
    op = _operators()
    axes = list(range(len(key.shape)))
    factor = scale if scale is not None else int(query.shape[-1]) ** -0.5
    turned = op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]])
    # The query is scaled before the product, which could overflow in half precision; CastLike
    # keeps that precision.
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=factor), query))
    logits = op.MatMul(scaled, turned)
    if attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """x (1 + erf(x / sqrt 2)) / 2, in the order of products that engines know as GELU.

    torch.onnx's own translation halves the bracket first; ONNX Runtime then makes five passes.
    """
    if approximate != "none":
        raise ModelError(f"GELU is exported in its exact form, not as approximate={approximate!r}")
    op = _operators()
    root, one, half = (
        op.CastLike(op.Constant(value_float=number), x) for number in (2**0.5, 1.0, 0.5)
    )
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def translations() -> dict[Any, Callable[..., Any]]:
    """custom_translation_table for torch.onnx.export(dynamo=True): operator -> ONNX graph.

    The package's own operators, and attention and GELU, whose own translations engines run slower.
    """
    namespace = torch.ops.latentguard
    return {
        namespace.patch_embed.default: _patch_embed,
        namespace.concept_similarity.default: _concept_similarity,
        namespace.concept_heatmap.default: _concept_heatmap,
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
        torch.ops.aten.gelu.default: _gelu,
    }
