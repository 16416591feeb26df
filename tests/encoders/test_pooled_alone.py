"""Exports without heat maps compute the pooled vector alone, and verdicts never depend on maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentguard import Latents, Scorer, load_encoder
from latentguard.encoders.catalog import LatentClipConfig
from latentguard.encoders.latent_clip import LatentCLIP

SMALL = LatentClipConfig(patch=8, embed_dim=512, text_width=128, width=128, layers=2, text_layers=2)
MODELS = (
    lambda: load_encoder("nano-sdxl"),
    lambda: LatentCLIP.random(SMALL),
    lambda: LatentCLIP.random(SMALL, merge=0.5),
    lambda: LatentCLIP.random(SMALL, resize="tile"),
)


@pytest.mark.parametrize("make", MODELS, ids=("nano", "clip", "merging", "tile"))
def test_without_tokens_the_pooled_vector_is_the_same(make: Callable[[], Any]) -> None:
    encoder, x = make(), torch.randn(2, 4, 64, 96, generator=torch.Generator().manual_seed(0))
    whole, alone = encoder.features(x), encoder.features(x, tokens=False)
    assert alone.tokens.shape[1] == 0
    assert (alone.grid, alone.tiles) == (whole.grid, whole.tiles)
    # A product of one row adds in another order; worst seen 3e-6.
    torch.testing.assert_close(alone.pooled, whole.pooled, rtol=1e-4, atol=1e-5)


def test_the_last_block_computes_one_token() -> None:
    encoder = LatentCLIP.random(SMALL)
    rows: list[int] = []
    last = encoder.vit.transformer.resblocks[-1]
    last.mlp.register_forward_hook(lambda _, given, made: rows.append(made.shape[1]))
    encoder.features(torch.randn(1, 4, 64, 64), tokens=False)
    encoder.features(torch.randn(1, 4, 64, 64))
    assert rows == [1, 65]


@pytest.mark.parametrize("make", MODELS[:3], ids=("nano", "clip", "merging"))
def test_verdicts_are_the_same_to_the_bit_with_heat_maps(make: Callable[[], Any]) -> None:
    scorer = Scorer("weapons", make(), device="cpu")
    latents = Latents(torch.randn(2, 4, 64, 64), "sdxl", scaled=True)
    plain, mapped = scorer.judge(latents), scorer.judge(latents, heatmaps=True)
    assert mapped.heatmaps is not None
    assert list(plain.verdicts) == list(mapped.verdicts)
