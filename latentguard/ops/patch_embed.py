"""patch_embed: from the latent to the transformer's input in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.ops import checks, library, onnx, reference
from latentguard.ops.arguments import Conversion, text

NAME = "patch_embed"
# Shared memory beside the rows, as in csrc/cuda/patch_embed.cu.
_BESIDE = 41_216


def patch_embed(
    latents: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    noise: Tensor | None = None,
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    """Estimate the clean latent, unscale, patchify, project, add class and position, normalize.

    x = (latents - sigma * noise) / alpha * scale + shift, each part left out where its arguments
    are None; tokens = layer_norm([class, patches(x) @ weight] + positional_embedding).
    Computed in float32 (float64 stays float64), rounded once to the dtype of `latents`.
    Differentiable in `latents` and `noise` through fused kernels; where gradients are enabled and
    another argument requires one, the whole call takes the PyTorch reference.

    Args:
        latents: [B, C, H, W], float32, float16 or bfloat16 (float64: reference); H and W are
            multiples of the patch.
        weight: [D, C, p, p] of the same dtype; p is 2, 4, 8 or 16, D a multiple of 64 up to 1536.
        class_embedding: [D], the same dtype.
        positional_embedding: [1 + N, D], the same dtype, N = H / p * W / p in row-major order,
            already interpolated to this grid; row 0 belongs to the class token.
        ln_weight: [D], the same dtype.
        ln_bias: [D], the same dtype.
        eps: added to the variance in the layer norm.
        scale: [C] float32, or [4C] for statistics over 2x2-packed channels (FLUX.2): the value of
            channel c at row y, column x is at index c * 4 + (y % 2) * 2 + x % 2.
        shift: [C] or [4C] float32, the same way.
        noise: [B, C, H, W], the dtype of `latents`: the predicted noise (or velocity).
        alpha: [B] float32, one per image; None is 1.
        sigma: [B] float32; required with `noise` and only then.

    Returns:
        tokens [B, 1 + N, D], the dtype of `latents`.

    Raises:
        RuntimeError: a dtype, device or shape other than these; it names the argument.
    """
    weights = (weight, class_embedding, positional_embedding, ln_weight, ln_bias)
    conversion = Conversion(scale, shift, noise, alpha, sigma)
    serves = library.use_kernels(latents, *weights, scale, shift, alpha, sigma)
    if serves and library.fits(latents.device, weight.shape[0], _BESIDE):
        tokens: Tensor = torch.ops.latentguard.patch_embed(latents, *weights, eps, *conversion)
        return tokens
    return _reference(latents, *weights, eps, conversion)


def _reference(
    latents: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    conversion: Conversion,
) -> Tensor:
    vectors = {"class_embedding": class_embedding, "ln_weight": ln_weight, "ln_bias": ln_bias}
    weights = (weight, class_embedding, positional_embedding, ln_weight, ln_bias)
    checks.patch_embed(NAME, latents, weight, positional_embedding, vectors, conversion)
    return reference.patch_embed(latents, *weights, eps, *conversion)


def _backward_reference(
    grad: Tensor,
    latents: Tensor,
    weight: Tensor,
    positional_embedding: Tensor,
    ln_weight: Tensor,
    eps: float,
    conversion: Conversion,
) -> Tensor:
    args = (latents, weight, positional_embedding)
    checks.patch_embed(NAME + "_backward", *args, {"ln_weight": ln_weight}, conversion)
    return reference.patch_embed_backward(grad, *args, ln_weight, eps, *conversion)


def _fake(latents: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    dim, _, patch, _ = weight.shape
    batch, _, height, width = latents.shape
    return latents.new_empty((batch, 1 + (height // patch) * (width // patch), dim))


def _backward_fake(grad: Tensor, latents: Tensor, *rest: Any) -> Tensor:
    return latents.new_empty(latents.shape)


def _onnx(
    latents: Any,
    weight: Any,
    class_embedding: Any,
    positional_embedding: Any,
    ln_weight: Any,
    ln_bias: Any,
    eps: float,
    conversion: Conversion,
) -> Any:
    op = onnx.operators()
    scale, shift, noise, alpha, sigma = conversion
    dim, channels, patch, _ = (int(size) for size in weight.shape)
    per_image = onnx.ints(op, -1, 1, 1, 1)
    x = onnx.up(op, latents)
    if noise is not None:
        x = op.Sub(x, op.Mul(op.Reshape(onnx.up(op, sigma), per_image), onnx.up(op, noise)))
    if alpha is not None:
        x = op.Div(x, op.Reshape(onnx.up(op, alpha), per_image))
    if scale is not None:
        x = op.Mul(x, _onnx_per_channel(op, onnx.up(op, scale), channels, latents))
    if shift is not None:
        x = op.Add(x, _onnx_per_channel(op, onnx.up(op, shift), channels, latents))
    x = op.Conv(x, onnx.up(op, weight), strides=[patch, patch])
    x = op.Transpose(op.Reshape(x, onnx.ints(op, 0, dim, -1)), perm=[0, 2, 1])
    batch = op.Shape(latents, start=0, end=1)
    size = op.Concat(batch, onnx.ints(op, 1, dim), axis=0)
    first = op.Expand(op.Reshape(onnx.up(op, class_embedding), onnx.ints(op, 1, 1, dim)), size)
    x = op.Add(op.Concat(first, x, axis=1), onnx.up(op, positional_embedding))
    return onnx.down(op, onnx.layer_norm(op, x, ln_weight, ln_bias, eps), latents)


def _onnx_per_channel(op: Any, vector: Any, channels: int, latents: Any) -> Any:
    if vector.shape[0] == channels:
        return op.Reshape(vector, onnx.ints(op, 1, channels, 1, 1))
    cells = op.Reshape(vector, onnx.ints(op, 1, channels, 2, 2))
    half = op.Div(op.Shape(latents, start=2), onnx.ints(op, 2))
    return op.Tile(cells, op.Concat(onnx.ints(op, 1, 1), half, axis=0))


library.register(
    NAME,
    "(Tensor latents, Tensor weight, Tensor class_embedding, Tensor positional_embedding, "
    f"Tensor ln_weight, Tensor ln_bias, float eps, {text(Conversion)}) -> Tensor",
    _reference,
    _fake,
    _onnx,
)
library.register(
    NAME + "_backward",
    "(Tensor grad, Tensor latents, Tensor weight, Tensor positional_embedding, "
    f"Tensor ln_weight, float eps, {text(Conversion)}) -> Tensor",
    _backward_reference,
    _backward_fake,
)
