"""patch_embed: from the latent to the transformer's input in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.ops import checks, library, reference


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
    """Estimate the clean latent, unscale, patchify, project, add class and position, normalise.

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
    args = (latents, *weights, eps, scale, shift, noise, alpha, sigma)
    if library.use_kernels(latents, *weights, scale, shift, alpha, sigma):
        tokens: Tensor = torch.ops.latentguard.patch_embed(*args)
        return tokens
    return _reference(*args)


def _reference(
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
    vectors = {"class_embedding": class_embedding, "ln_weight": ln_weight, "ln_bias": ln_bias}
    clean = (scale, shift, noise, alpha, sigma)
    checks.patch_embed("patch_embed", latents, weight, positional_embedding, vectors, *clean)
    return reference.patch_embed(
        latents,
        weight,
        class_embedding,
        positional_embedding,
        ln_weight,
        ln_bias,
        eps,
        *clean,
    )


def _backward_reference(
    grad: Tensor,
    latents: Tensor,
    weight: Tensor,
    positional_embedding: Tensor,
    ln_weight: Tensor,
    eps: float,
    *clean: Tensor | None,
) -> Tensor:
    args = (latents, weight, positional_embedding)
    checks.patch_embed("patch_embed_backward", *args, {"ln_weight": ln_weight}, *_five(clean))
    return reference.patch_embed_backward(grad, *args, ln_weight, eps, *clean)


def _five(clean: tuple[Tensor | None, ...]) -> Any:
    return (*clean, None, None, None, None, None)[:5]


def _fake(latents: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    dim, _, patch, _ = weight.shape
    batch, _, height, width = latents.shape
    return latents.new_empty((batch, 1 + (height // patch) * (width // patch), dim))


def _backward_fake(grad: Tensor, latents: Tensor, *rest: Any) -> Tensor:
    return latents.new_empty(latents.shape)


library.register("patch_embed", _reference, _fake)
library.register("patch_embed_backward", _backward_reference, _backward_fake)
