"""Every operator in plain PyTorch: the definition of what the compiled kernels compute.

Half precision is computed in float32 and rounded once, at the end; float64 stays float64. The
backward functions are written out because an operator's kernel runs below autograd; tests compare
them with autograd through the forward functions here. All are called with the flat arguments of
their schemas (see `arguments.flat`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.ops.arguments import Bank, Conversion, Head, Saved, Weights, flat

# Norms below this count as zero: the direction of such a vector is rounding noise.
NORM_FLOOR = 1e-12


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _up(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _per_channel(vector: Tensor, latents: Tensor) -> Tensor:
    """A [C] or 2x2-packed [4C] vector (index c * 4 + dy * 2 + dx) as a map over [1, C, H, W]."""
    channels, height, width = latents.shape[1:]
    if vector.shape[0] == channels:
        return vector.view(1, channels, 1, 1)
    return vector.view(1, channels, 2, 2).repeat(1, 1, height // 2, width // 2)


def _per_image(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1, 1)


@flat
def null(x: Tensor, scale: float) -> Tensor:
    """x * scale, the template operator; see `latentguard.ops.null`."""
    return (x.to(_compute_dtype(x)) * scale).to(x.dtype)


@flat
def null_backward(grad: Tensor, scale: float) -> Tensor:
    """Gradient of `null` with respect to `x`: that of its result, times the scale."""
    return (grad.to(_compute_dtype(grad)) * scale).to(grad.dtype)


def _clean(latents: Tensor, conversion: Conversion) -> Tensor:
    """(latents - sigma * noise) / alpha * scale + shift, in the dtype of computation."""
    scale, shift, noise, alpha, sigma = conversion
    dtype = _compute_dtype(latents)
    x = latents.to(dtype)
    if noise is not None and sigma is not None:
        x = x - _per_image(sigma.to(dtype)) * noise.to(dtype)
    if alpha is not None:
        x = x / _per_image(alpha.to(dtype))
    if scale is not None:
        x = x * _per_channel(scale.to(dtype), latents)
    if shift is not None:
        x = x + _per_channel(shift.to(dtype), latents)
    return x


@flat
def patch_embed(
    latents: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    conversion: Conversion,
) -> Tensor:
    """Latents to the transformer's input; arguments as in `latentguard.ops.patch_embed`."""
    dtype = _compute_dtype(latents)
    patch = weight.shape[-1]
    x = _clean(latents, conversion)
    patches = F.conv2d(x, weight.to(dtype), stride=patch).flatten(2).transpose(1, 2)
    first = class_embedding.to(dtype).expand(latents.shape[0], 1, -1)
    tokens = torch.cat((first, patches), dim=1) + positional_embedding.to(dtype)
    width = (weight.shape[0],)
    tokens = F.layer_norm(tokens, width, ln_weight.to(dtype), ln_bias.to(dtype), eps)
    return tokens.to(latents.dtype)


def _layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps)
    normal = (x - mean) * rstd
    g = grad * weight
    return rstd * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))


@flat
def patch_embed_backward(
    grad: Tensor,
    latents: Tensor,
    weight: Tensor,
    positional_embedding: Tensor,
    ln_weight: Tensor,
    eps: float,
    conversion: Conversion,
) -> Tensor:
    """Gradient of `patch_embed` with respect to `latents`, from that of its tokens."""
    dtype = _compute_dtype(latents)
    patch = weight.shape[-1]
    batch, channels, height, width = latents.shape
    rows, columns = height // patch, width // patch
    x = _clean(latents, conversion)
    kernel = weight.to(dtype)
    before = F.conv2d(x, kernel, stride=patch).flatten(2).transpose(1, 2)
    before = before + positional_embedding.to(dtype)[1:]
    inner = _layer_norm_backward(grad[:, 1:].to(dtype), before, ln_weight.to(dtype), eps)
    pieces = (inner @ kernel.flatten(1)).view(batch, rows, columns, channels, patch, patch)
    out = pieces.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
    if conversion.scale is not None:
        out = out * _per_channel(conversion.scale.to(dtype), latents)
    if conversion.alpha is not None:
        out = out / _per_image(conversion.alpha.to(dtype))
    return out.to(latents.dtype)


def _project(features: Tensor, head: Head) -> Tensor:
    """Layer norm and projection of [..., D] rows, either of them optional: [..., E]."""
    ln_weight, ln_bias, eps, projection = head
    dtype = _compute_dtype(features)
    x = features.to(dtype)
    if ln_weight is not None:
        x = F.layer_norm(x, (x.shape[-1],), ln_weight.to(dtype), _up(ln_bias, dtype), eps)
    if projection is not None:
        x = x @ projection.to(dtype)
    return x


def _best(cosine: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each row in each [begin, end) segment, and its column.

    A segment that is empty or leaves the bank gives NaN and -1: whoever reads it fails closed.
    Concepts are taken one at a time, so that nothing larger than the cosines is ever held.
    """
    prompts = cosine.shape[-1]
    if prompts == 0 or segments.shape[0] == 0:
        shape = (*cosine.shape[:-1], segments.shape[0])
        return cosine.new_full(shape, torch.nan), cosine.new_full(shape, -1, dtype=torch.int64)
    column = torch.arange(prompts, device=cosine.device)
    values, indices = [], []
    for begin, end in segments.to(cosine.device).unbind(0):
        outside = (column < begin) | (column >= end)
        value, index = cosine.masked_fill(outside, -torch.inf).max(-1)
        invalid = (begin < 0) | (end > prompts) | (begin >= end)
        values.append(value.masked_fill(invalid, torch.nan))
        indices.append(index.masked_fill(invalid, -1))
    return torch.stack(values, -1), torch.stack(indices, -1)


@flat
def concept_similarity(
    features: Tensor,
    head: Head,
    bank: Bank,
    logit_scale: float,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Probability, margin, best prompt and best contrast prompt of [..., D] rows: [..., K] each.

    The last output is what the backward needs besides: the projected rows [..., E] before their
    norm, in the dtype of `features`; empty unless `save`.
    """
    dtype = _compute_dtype(features)
    x = _project(features, head)
    unit = F.normalize(x, dim=-1, eps=NORM_FLOOR)
    value, prompt = _best(unit @ bank.concepts.to(dtype).t(), bank.segments)
    ranges = bank.contrast_segments
    against, contrast_prompt = _best(unit @ bank.contrast.to(dtype).t(), ranges)
    margin = value - against
    projected = x.to(features.dtype, copy=True) if save else features.new_empty(0)
    return torch.sigmoid(logit_scale * margin), margin, prompt, contrast_prompt, projected


@flat
def concept_similarity_backward(
    grad_probability: Tensor | None,
    grad_margin: Tensor | None,
    features: Tensor,
    weights: Weights,
    probability: Tensor,
    saved: Saved,
    logit_scale: float,
) -> Tensor:
    """Gradient with respect to [..., D] `features`, from that of probability and margin.

    The maximum passes its gradient to the prompt that reached it; ties go to the first.
    """
    dtype = _compute_dtype(features)
    g = torch.zeros_like(probability, dtype=dtype)
    if grad_margin is not None:
        g = g + grad_margin
    if grad_probability is not None:
        g = g + grad_probability * logit_scale * probability * (1 - probability)
    x = saved.projected.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    unit = x / norm
    inner = torch.zeros_like(unit)
    sides = (
        (weights.concepts, saved.best_prompt, 1.0),
        (weights.contrast, saved.best_contrast, -1.0),
    )
    for bank, best, sign in sides:
        if bank.shape[0] == 0:
            continue
        shares = g.new_zeros((*g.shape[:-1], bank.shape[0]))
        shares.scatter_add_(-1, best.clamp_min(0), g.masked_fill(best < 0, 0.0) * sign)
        inner = inner + shares @ bank.to(dtype)
    out = (inner - unit * (unit * inner).sum(-1, keepdim=True)) / norm
    if weights.projection is not None:
        out = out @ weights.projection.to(dtype).t()
    if weights.ln_weight is not None:
        scale = weights.ln_weight.to(dtype)
        out = _layer_norm_backward(out, features.to(dtype), scale, weights.eps)
    gradient: Tensor = out.to(features.dtype)
    return gradient


@flat
def concept_heatmap(
    tokens: Tensor,
    head: Head,
    bank: Bank,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Margin [B, K, N] of every patch token; see `latentguard.ops.concept_heatmap`.

    The other outputs are what the backward needs: best prompt and best contrast prompt [B, K, N]
    and the projected rows [B, N, E]; empty unless `save`.
    """
    found = concept_similarity(tokens, *head, *bank, 1.0, save)
    _, margin, prompt, against, projected = found
    margin = margin.transpose(1, 2).contiguous()
    if not save:
        nothing = tokens.new_empty(0, dtype=torch.int64)
        return margin, nothing, nothing.clone(), projected
    best, best_contrast = (index.transpose(1, 2).contiguous() for index in (prompt, against))
    return margin, best, best_contrast, projected


@flat
def concept_heatmap_backward(
    grad: Tensor,
    tokens: Tensor,
    weights: Weights,
    saved: Saved,
) -> Tensor:
    """Gradient with respect to `tokens`, from that of the margin and what the forward saved."""
    margin, prompt, against = (
        t.transpose(1, 2) for t in (grad, saved.best_prompt, saved.best_contrast)
    )
    kept = (prompt, against, saved.projected)
    return concept_similarity_backward(None, margin, tokens, *weights, margin, *kept, 1.0)
