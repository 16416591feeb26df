"""The table of translations to standard ONNX operators, and the pieces that they are made of.

    torch.onnx.export(model, args, dynamo=True, custom_translation_table=translations())

Each operator's own translation stands in its file. Everything is computed in float32, as the
kernels do. The batch may be dynamic, and so may height and width where the positional embedding
follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from latentguard.errors import ModelError
from latentguard.ops import library

OPSET = 18
FLOAT, INT64, BOOL = 1, 7, 9  # numbers of the types in ONNX


def operators() -> Any:
    """The module whose functions add nodes to the graph."""
    from onnxscript import opset18

    return opset18


def up(op: Any, value: Any) -> Any:
    """A value as float32; nothing is added where it is float32 already."""
    if value is None or (value.dtype is not None and int(value.dtype) == FLOAT):
        return value
    return op.Cast(value, to=FLOAT)


def down(op: Any, value: Any, like: Any) -> Any:
    """A float32 value in the type of another; nothing is added where that is float32."""
    return value if int(like.dtype) == FLOAT else op.CastLike(value, like)


def kind(value: Any) -> int:
    """The number of a value's element type in ONNX."""
    return int(value.dtype)


def layer_norm(op: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Layer norm over the last axis, in float32."""
    # The operator has three outputs; mean and deviation are not used.
    out = op.LayerNormalization(x, up(op, weight), up(op, bias), axis=-1, epsilon=eps)
    return out[0] if isinstance(out, tuple) else out


def ints(op: Any, *values: int) -> Any:
    """A constant [len(values)] int64: a shape, axes, indices."""
    return op.Constant(value_ints=list(values))


def nothing(op: Any, dtype: int) -> Any:
    """An empty tensor, as the operators give where nothing is saved for a backward."""
    return op.Cast(op.ConstantOfShape(ints(op, 0)), to=dtype)


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
    chosen = attn_mask is not None and kind(attn_mask) == BOOL
    if chosen or dropout_p or is_causal or enable_gqa:
        raise ModelError(
            "attention is exported without dropout, and with masks that are added to its logits"
        )
    op = operators()
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
    op = operators()
    root, one, half = (
        op.CastLike(op.Constant(value_float=number), x) for number in (2**0.5, 1.0, 0.5)
    )
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def translations() -> dict[Any, Callable[..., Any]]:
    """custom_translation_table for torch.onnx.export(dynamo=True): operator -> ONNX graph.

    The package's own operators, and attention and GELU, whose own translations engines run slower.
    """
    namespace = torch.ops.latentguard
    own = library.TRANSLATIONS.items()
    return {
        **{getattr(namespace, name).default: translation for name, translation in own},
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
        torch.ops.aten.gelu.default: _gelu,
    }
