"""null: x * scale, the template that a new operator is copied from (docs/ops.md).

It does the least that shows everything an operator brings. Nothing in the package calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.ops import checks, library, onnx, reference

NAME = "null"


def null(x: Tensor, scale: float) -> Tensor:
    """x * scale, computed in float32 and rounded once; differentiable in `x`.

    Args:
        x: any shape; float32, float16 or bfloat16 (float64: reference).
        scale: a finite number.

    Returns:
        A new tensor, shape and dtype of `x`.

    Raises:
        RuntimeError: a dtype or a scale other than these; it names the argument.
    """
    # The choice between kernel and reference is made here, not in the operator, so that weights
    # which are trained can take the reference (there are none here).
    if library.use_kernels(x):
        out: Tensor = torch.ops.latentguard.null(x, scale)
        return out
    return _reference(x, scale)


def _reference(x: Tensor, scale: float) -> Tensor:
    # The same sentences as in csrc/ops/null.cpp: whoever has no compiler reads them too.
    checks.floating(NAME, "x", x)
    checks.finite(NAME, "scale", scale)
    return reference.null(x, scale)


def _fake(x: Tensor, scale: float) -> Tensor:
    """What the kernel returns, without its numbers: for tracing, compiling and exporting."""
    return x.new_empty(x.shape)


def _backward_fake(grad: Tensor, scale: float) -> Tensor:
    return grad.new_empty(grad.shape)


def _onnx(x: Any, scale: float) -> Any:
    """The operator in standard ONNX operators, in float32 as the kernels compute."""
    op = onnx.operators()
    factor = op.Constant(value_float=float(scale))
    return onnx.down(op, op.Mul(onnx.up(op, x), factor), x)


# The schema stands here alone: csrc/ops/null.cpp registers kernels for it, and torch refuses them
# where their C++ types are others.
library.register(NAME, "(Tensor x, float scale) -> Tensor", _reference, _fake, _onnx)
library.register(
    NAME + "_backward",
    "(Tensor grad, float scale) -> Tensor",
    reference.null_backward,
    _backward_fake,
)
