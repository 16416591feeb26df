"""Argument checks of the operators where no compiled kernel makes them (reference, fake tensors).

The same sentences stand in csrc/ops: operator, argument, what it must be, what it got.
"""

from __future__ import annotations

import math

from torch import Tensor

from latentguard.ops.arguments import Bank, Conversion, Head


def _fail(operator: str, argument: str, must: str, got: object) -> None:
    raise RuntimeError(f"`{operator}`: `{argument}` must be {must}, got {got}")


def shape(operator: str, argument: str, tensor: Tensor, *sizes: int | None) -> None:
    """Rank and sizes; None stands for any size."""
    got = list(tensor.shape)
    if len(got) != len(sizes) or any(
        want is not None and have != want for have, want in zip(got, sizes, strict=False)
    ):
        want = ", ".join("*" if size is None else str(size) for size in sizes)
        _fail(operator, argument, f"of shape [{want}]", got)


def same_kind(operator: str, argument: str, tensor: Tensor, like: Tensor, name: str) -> None:
    """Device and dtype of another argument."""
    if tensor.device != like.device:
        _fail(operator, argument, f"on the device of `{name}` ({like.device})", tensor.device)
    if tensor.dtype != like.dtype:
        _fail(operator, argument, f"of the dtype of `{name}` ({like.dtype})", tensor.dtype)


def floating(operator: str, argument: str, tensor: Tensor) -> None:
    """A floating dtype."""
    if not tensor.dtype.is_floating_point:
        _fail(operator, argument, "a floating-point tensor", tensor.dtype)


def finite(operator: str, argument: str, number: float) -> None:
    """A number that is neither infinite nor NaN."""
    if not math.isfinite(number):
        _fail(operator, argument, "a finite number", number)


def patch_embed(
    operator: str,
    latents: Tensor,
    weight: Tensor,
    positional_embedding: Tensor,
    vectors: dict[str, Tensor],
    conversion: Conversion,
) -> None:
    """All arguments of patch_embed and its backward; `vectors` are those of size [D]."""
    scale, shift, noise, alpha, sigma = conversion
    floating(operator, "latents", latents)
    shape(operator, "latents", latents, None, None, None, None)
    batch, channels, height, width = latents.shape
    same_kind(operator, "weight", weight, latents, "latents")
    shape(operator, "weight", weight, None, channels, None, None)
    dim, _, patch, across = weight.shape
    if patch not in (2, 4, 8, 16) or patch != across:
        _fail(operator, "weight", "a square patch of 2, 4, 8 or 16", list(weight.shape))
    if dim % 64 or not 0 < dim <= 1536:
        _fail(operator, "weight", "of a width that is a multiple of 64 up to 1536", dim)
    if height % patch or width % patch:
        _fail(
            operator,
            "latents",
            f"a multiple of the patch ({patch}) high and wide",
            [*latents.shape],
        )
    tokens = 1 + (height // patch) * (width // patch)
    same_kind(operator, "positional_embedding", positional_embedding, latents, "latents")
    shape(operator, "positional_embedding", positional_embedding, tokens, dim)
    for argument, vector in vectors.items():
        same_kind(operator, argument, vector, latents, "latents")
        shape(operator, argument, vector, dim)
    for argument, affine in (("scale", scale), ("shift", shift)):
        if affine is None:
            continue
        floating(operator, argument, affine)
        if affine.dim() != 1 or affine.shape[0] not in (channels, 4 * channels):
            want = f"of shape [{channels}] or, packed 2x2, [{4 * channels}]"
            _fail(operator, argument, want, list(affine.shape))
    if noise is not None:
        same_kind(operator, "noise", noise, latents, "latents")
        shape(operator, "noise", noise, *latents.shape)
    if (noise is None) != (sigma is None):
        _fail(operator, "sigma", "given together with `noise`", "one without the other")
    for argument, level in (("alpha", alpha), ("sigma", sigma)):
        if level is not None:
            floating(operator, argument, level)
            shape(operator, argument, level, batch)


def concepts(operator: str, argument: str, features: Tensor, head: Head, bank: Bank) -> None:
    """The arguments that concept_similarity and concept_heatmap share."""
    floating(operator, argument, features)
    dim = features.shape[-1]
    if (head.ln_weight is None) != (head.ln_bias is None):
        _fail(operator, "ln_bias", "given together with `ln_weight`", "one without the other")
    for name, vector in (("ln_weight", head.ln_weight), ("ln_bias", head.ln_bias)):
        if vector is not None:
            same_kind(operator, name, vector, features, argument)
            shape(operator, name, vector, dim)
    if head.projection is not None:
        same_kind(operator, "projection", head.projection, features, argument)
        shape(operator, "projection", head.projection, dim, None)
        dim = head.projection.shape[1]
    for name, rows in (("concepts", bank.concepts), ("contrast", bank.contrast)):
        same_kind(operator, name, rows, features, argument)
        shape(operator, name, rows, None, dim)
    both = (("segments", bank.segments), ("contrast_segments", bank.contrast_segments))
    for name, ranges in both:
        if str(ranges.dtype) != "torch.int32":
            _fail(operator, name, "of dtype torch.int32", ranges.dtype)
        if ranges.device != features.device:
            must = f"on the device of `{argument}` ({features.device})"
            _fail(operator, name, must, ranges.device)
        shape(operator, name, ranges, bank.segments.shape[0], 2)
