"""Latent-CLIP's image tower: a Vision Transformer (Dosovitskiy et al. 2021) over latents.

Module names give the published checkpoint's keys once `visual.latent_vit.` is taken off them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentguard import ops
from latentguard.encoders.catalog import LatentClipConfig
from latentguard.encoders.merging import Tokens, merge, schedule
from latentguard.encoders.resize import is_open

HEAD_WIDTH = 64


class Attention(nn.Module):
    """Self-attention with nn.MultiheadAttention's parameters, over scaled_dot_product_attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, size: Tensor | None = None, asking: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, N, D] to [B, N, D], and the keys [B, heads, N, 64].

        A token counts as often as `size` [B, N, 1] says (1 where it is None). The result has the
        first `asking` tokens (all where it is None).
        """
        batch, count, _ = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.reshape(batch, count, 3, -1, HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, 64] each
        often = None if size is None else size.log().transpose(1, 2).unsqueeze(1)  # [B, 1, 1, N]
        out = F.scaled_dot_product_attention(q[:, :, :asking], k, v, often)
        return self.out_proj(out.transpose(1, 2).flatten(2)), k


class Block(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=nn.GELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )

    def forward(self, tokens: Tokens, count: int = 0) -> Tokens:
        """The next tokens, `count` fewer."""
        mixed, keys = self.attn(self.ln_1(tokens.values), tokens.size)
        tokens = tokens._replace(values=tokens.values + mixed)
        if count:
            tokens = merge(tokens, keys, count)
        return tokens._replace(values=tokens.values + self.mlp(self.ln_2(tokens.values)))

    def first(self, tokens: Tokens) -> Tensor:
        """The first of the next tokens alone, [B, 1, D]."""
        mixed, _ = self.attn(self.ln_1(tokens.values), tokens.size, 1)
        value = tokens.values[:, :1] + mixed
        result: Tensor = value + self.mlp(self.ln_2(value))
        return result


class Transformer(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor, counts: Sequence[int] | None = None, whole: bool = True) -> Tensor:
        """[B, N, D] to [B, N, D]; `counts` of them merge on the way, a number for each block.

        Without `whole` to [B, 1, D], the first alone: no other is computed in the last block.
        """
        tokens = Tokens(x)
        *blocks, last = zip(self.resblocks, counts or [0] * len(self.resblocks), strict=True)
        for block, count in blocks:
            tokens = block(tokens, count)
        block, count = last
        if not whole:
            assert isinstance(block, Block)
            return block.first(tokens)
        restored: Tensor = block(tokens, count).restored()
        return restored


class LatentViT(nn.Module):
    """Latents [B, C, H, W] to tokens [B, 1 + N, D]; `ln_post` and `proj` are left to the head."""

    def __init__(self, config: LatentClipConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch
        self.patch, self.side = patch, config.side
        self.conv1 = nn.Conv2d(config.channels, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + self.side**2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def position(self, rows: int, columns: int) -> Tensor:
        """The positional embedding [1 + rows * columns, D] of a grid of patches.

        On another grid than the trained one: bicubic with antialiasing, in float32, the class
        token's row as it is (what open_clip does to a checkpoint of another image size).
        """
        trained = self.positional_embedding
        # At the trained size interpolation changes nothing: an export of open size has it always.
        if not is_open(rows) and not is_open(columns) and rows == columns == self.side:
            return trained
        table = trained[1:].float().reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, (rows, columns), mode="bicubic", antialias=True)
        resized = table[0].flatten(1).t().to(trained.dtype)
        return torch.cat((trained[:1], resized))

    def forward(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        share: float = 0.0,
        whole: bool = True,
    ) -> Tensor:
        """Tokens before `ln_post`, the class token first (without `whole` that one alone).

        H and W are multiples of the patch.

        What is read is (latents - sigma * noise) / alpha * scale + shift: see `ops.patch_embed`.

        `share` of the patches' tokens have merged into others at the end; see `merging.schedule`.
        """
        rows, columns = latents.shape[-2] // self.patch, latents.shape[-1] // self.patch
        tokens = ops.patch_embed(
            latents,
            self.conv1.weight,
            self.class_embedding,
            self.position(rows, columns),
            self.ln_pre.weight,
            self.ln_pre.bias,
            self.ln_pre.eps,
            scale,
            shift,
            noise,
            alpha,
            sigma,
        )
        blocks = len(self.transformer.resblocks)
        counts = schedule(share, rows * columns, blocks) if share else None
        out: Tensor = self.transformer(tokens, counts, whole)
        return out
