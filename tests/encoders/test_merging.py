"""Token merging against a reference of plain loops, and what it leaves as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip_reference import SMALL_B4, SMALL_B8, Reference
from torch import Tensor

from latentguard.encoders import load_encoder
from latentguard.encoders.catalog import LatentClipConfig
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.encoders.merging import EPS, Tokens, merge, schedule
from latentguard.encoders.vit import HEAD_WIDTH, Block, LatentViT
from latentguard.errors import ModelError
from latentguard.scorer import Scorer
from latentguard.spaces import Latents

# As deep as needed for tokens that merged to merge again.
DEEP = LatentClipConfig(
    patch=4, embed_dim=64, text_width=64, width=128, layers=5, text_layers=1, grid=20
)
TINY = LatentClipConfig(
    patch=4, embed_dim=16, text_width=64, width=64, layers=3, text_layers=1, grid=12
)
EXACT = 1e-9
"""Two ways through the same sums in float64; worst seen 1e-14."""


def latents(batch: int, config: LatentClipConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.channels, config.grid, config.grid)
    return 6 * torch.randn(shape, generator=generator, dtype=torch.float64)


# --- the reference: one image, one token at a time -------------------------------------------


def attention(block: Block, x: list[Tensor], size: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """What attention adds to each token, and each token's key, the mean over heads."""
    attn, heads = block.attn, len(x[0]) // HEAD_WIDTH
    parts = [attn.in_proj_weight @ block.ln_1(row) + attn.in_proj_bias for row in x]
    q, k, v = ([part.chunk(3)[i].reshape(heads, HEAD_WIDTH) for part in parts] for i in range(3))
    out = []
    for query in q:
        mixed = []
        for head in range(heads):
            # A token that stands for s patches counts as s tokens would.
            weights = [
                s * math.exp(float(query[head] @ key[head]) / math.sqrt(HEAD_WIDTH))
                for key, s in zip(k, size, strict=True)
            ]
            parts_ = [w * value[head] for w, value in zip(weights, v, strict=True)]
            mixed.append(sum(parts_, torch.zeros_like(v[0][head])) / sum(weights))
        out.append(attn.out_proj(torch.cat(mixed)))
    return out, [key.mean(0) for key in k]


def joined(
    x: list[Tensor], size: list[int], members: list[set[int]], keys: list[Tensor], count: int
) -> tuple[list[Tensor], list[int], list[set[int]]]:
    """One step of bipartite soft matching, Bolya et al. 2022, section 3."""
    taking, going = range(1, len(x), 2), range(2, len(x), 2)
    unit = [key / (key.square().mean() + EPS).sqrt() for key in keys]
    best = {i: max(taking, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in going}
    gone = sorted(going, key=lambda i: -float(unit[i] @ unit[best[i]]))[:count]
    kept = [i for i in going if i not in gone]
    order = [0, *kept, *taking]
    new_x, new_size, new_members = [], [], []
    for i in order:
        group = [i, *(j for j in gone if best[j] == i)] if i in taking else [i]
        total = sum(size[j] for j in group)
        weighted = [size[j] * x[j] for j in group]
        new_x.append(sum(weighted, torch.zeros_like(x[0])) / total)
        new_size.append(total)
        new_members.append(set().union(*(members[j] for j in group)))
    return new_x, new_size, new_members


@torch.no_grad()
def reference(vit: LatentViT, tokens: Tensor, counts: list[int]) -> Tensor:
    """From the embedded patches [1 + N, D] of one image to the tokens of all patches [1 + N, D]."""
    x, size = list(tokens), [1] * len(tokens)
    members = [{index} for index in range(len(tokens))]
    for block, count in zip(vit.transformer.resblocks, counts, strict=True):
        assert isinstance(block, Block)
        added, keys = attention(block, x, size)
        x = [row + more for row, more in zip(x, added, strict=True)]
        if count:
            x, size, members = joined(x, size, members, keys, count)
        x = [row + block.mlp(block.ln_2(row)) for row in x]
    place = {patch: index for index, group in enumerate(members) for patch in group}
    assert sorted(place) == list(range(len(tokens)))
    return torch.stack([x[place[patch]] for patch in range(len(tokens))])


@torch.no_grad()
def embedded(vit: LatentViT, raw: Tensor) -> Tensor:
    """The tokens that the first block gets."""
    seen: list[Tensor] = []
    hook = vit.transformer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    vit(raw)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("grid", [20, 12])  # 25 and 9 patches: odd numbers
def test_it_is_what_loops_compute(share: float, grid: int) -> None:
    config = LatentClipConfig(**{**DEEP.to_dict(), "grid": grid})
    vit = LatentCLIP.random(config).to(dtype=torch.float64).vit
    raw = latents(2, config)
    counts = schedule(share, config.side**2, config.layers)
    assert sum(counts) > 0
    got = vit(raw, share=share)
    for image, tokens in enumerate(embedded(vit, raw)):
        want = reference(vit, tokens, counts)
        torch.testing.assert_close(got[image], want, atol=EXACT, rtol=0)
    # Merging changes something, or agreement would say little.
    assert (got - vit(raw)).abs().max() > 1e-3


def test_nothing_merges_by_default() -> None:
    """The blocks one after the other, written out: not a bit differs."""
    encoder = LatentCLIP.random(SMALL_B4)
    raw = latents(2, SMALL_B4).float()
    x = embedded(encoder.vit, raw)
    for block in encoder.vit.transformer.resblocks:
        assert isinstance(block, Block)
        x = x + block.attn(block.ln_1(x))[0]
        x = x + block.mlp(block.ln_2(x))
    features = encoder.features(raw)
    assert torch.equal(features.pooled, x[:, 0])
    assert torch.equal(features.tokens, x[:, 1:])
    assert (encoder.merge, encoder.name) == (0.0, "latent-clip-p4-random")


def test_a_token_counts_as_often_as_it_says() -> None:
    """Attention over one token of size 3 is attention over three like it."""
    attn = LatentCLIP.random(SMALL_B8).to(dtype=torch.float64).vit.transformer.resblocks[0].attn
    x = torch.randn(1, 4, SMALL_B8.width, dtype=torch.float64)
    size = torch.tensor([1.0, 3.0, 1.0, 2.0], dtype=torch.float64).reshape(1, 4, 1)
    got, _ = attn(x, size)
    want, _ = attn(x[:, [0, 1, 1, 1, 2, 3, 3]])
    torch.testing.assert_close(got, want[:, [0, 1, 4, 5]], atol=EXACT, rtol=0)


def test_equal_patches_merge_without_loss() -> None:
    """Patches in equal pairs: half of the tokens go, and nothing is lost but their number."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(1, 8, 64, generator=generator, dtype=torch.float64)
    values = torch.cat((torch.randn(1, 1, 64).double(), pairs.repeat_interleave(2, 1)), dim=1)
    merged = merge(Tokens(values), values.unsqueeze(1), 8)
    assert merged.values.shape == (1, 9, 64)
    assert merged.size is not None
    assert merged.size.flatten().tolist() == [1] + [2] * 8
    torch.testing.assert_close(merged.restored(), values, atol=EXACT, rtol=0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    encoder = LatentCLIP.random(DEEP, merge=0.5).to(dtype=torch.float64)
    raw = latents(4, DEEP)
    together = encoder.features(raw)
    for image in range(4):
        alone = encoder.features(raw[image : image + 1])
        torch.testing.assert_close(together.pooled[image], alone.pooled[0], atol=EXACT, rtol=0)
        torch.testing.assert_close(together.tokens[image], alone.tokens[0], atol=EXACT, rtol=0)


def test_a_nan_stays_in_its_image() -> None:
    encoder = LatentCLIP.random(SMALL_B8, merge=0.5)
    raw = latents(3, SMALL_B8).float()
    want = encoder.features(raw).pooled
    raw[1, 2, 30, 30] = torch.nan
    got = encoder.features(raw).pooled
    assert got[1].isnan().all()
    torch.testing.assert_close(got[::2], want[::2])
    verdict = Scorer("weapons", encoder).verdicts(Latents(raw, "sdxl", scaled=False))[1]
    assert (verdict.decision, verdict.error is not None) == ("block", True)


def test_gradients_pass_through_merges() -> None:
    """Which merge is a choice; around it the derivative is that of what was computed."""
    vit = LatentCLIP.random(TINY).to(dtype=torch.float64).vit
    tokens = embedded(vit, latents(1, TINY)).requires_grad_()
    counts = schedule(0.6, TINY.side**2, TINY.layers)
    assert counts == [2, 3, 0]

    def forward(x: Tensor) -> Tensor:
        return vit.transformer(x, counts)[..., :3]

    assert torch.autograd.gradcheck(forward, tokens, fast_mode=True)


def test_steering_has_a_gradient_everywhere() -> None:
    encoder = LatentCLIP.random(SMALL_B4, merge=0.5)
    raw = latents(1, SMALL_B4).float().requires_grad_()
    encoder.encode_latents(Latents(raw, "sdxl", scaled=False))[:, 0].sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert (raw.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("size", [(64, 64), (52, 76), (4, 4), (4, 8)])
@pytest.mark.parametrize("resize", ["interpolate", "pool", "tile"])
def test_every_size_keeps_its_shapes(size: tuple[int, int], resize: str) -> None:
    encoder = LatentCLIP.random(SMALL_B4, resize=resize)  # type: ignore[arg-type]
    raw = torch.randn(2, 4, *size)
    want = encoder.features(raw)
    encoder.merge = 0.4
    got = encoder.features(raw)
    assert got.pooled.shape == want.pooled.shape
    assert got.tokens.shape == want.tokens.shape
    assert got.pooled.isfinite().all()
    assert (got.grid, got.tiles) == (want.grid, want.tiles)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    full = LatentCLIP.random(SMALL_B4, merge=0.3)
    raw = Latents(latents(2, SMALL_B4).float(), "sdxl", scaled=False)
    want = full.encode_latents(raw)
    half = full.to(dtype=dtype)
    assert half.features(raw.tensor).tokens.dtype == dtype
    # Rounding may change which are most similar; worst seen 0.999996 and 0.99986.
    assert (half.encode_latents(raw) * want).sum(-1).min() > 0.998


@pytest.mark.slow
def test_one_graph_for_the_compiler() -> None:
    encoder = LatentCLIP.random(TINY, merge=0.5)
    raw = latents(2, TINY).float()
    compiled = torch.compile(
        lambda x: encoder.features(x).tokens, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(raw), encoder.features(raw).tokens, atol=1e-4, rtol=0)


# --- how many -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("patches", [64, 255, 256, 1024])
def test_the_share_is_spread_over_all_blocks_but_the_last(share: float, patches: int) -> None:
    counts = schedule(share, patches, 12)
    assert len(counts) == 12
    assert counts[-1] == 0
    assert sum(counts) == round(share * patches)
    assert max(counts[:-1]) - min(counts[:-1]) <= 1


@pytest.mark.parametrize(("patches", "blocks"), [(1, 3), (2, 3), (9, 2), (100, 2), (100, 1)])
def test_no_block_merges_more_than_half(patches: int, blocks: int) -> None:
    left = patches
    for count in schedule(0.99, patches, blocks):
        assert 0 <= count <= left // 2
        left -= count
    assert left >= 1


def test_tokens_left() -> None:
    encoder = LatentCLIP.random(DEEP, merge=0.5)
    assert encoder.tokens_left(20, 20) == (25, 13)
    assert encoder.tokens_left(18, 40) == (50, 25)


# --- what it is called ----------------------------------------------------------------------


def test_names_that_have_no_tokens_to_merge() -> None:
    with pytest.raises(ModelError, match="nano-flux2 has no tokens to merge"):
        load_encoder("nano-flux2+merge=0.5", "cpu")
    with pytest.raises(ModelError, match=r"no model or file is called 'b9'"):
        load_encoder("b9+merge=0.5", "cpu")


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_shares_that_mean_nothing_are_refused(share: float) -> None:
    with pytest.raises(ModelError, match="share of tokens that merge must be from 0 to less than"):
        LatentCLIP.random(SMALL_B8, merge=share)


def test_a_file_may_ask_for_it(
    own_cache: Path, official: Callable[..., Path], reference_b8: Reference
) -> None:
    plain = LatentCLIP.load(official(reference_b8.checkpoint()), config=SMALL_B8)
    (converted,) = (own_cache / "converted").iterdir()
    encoder = load_encoder(f"{converted}+merge=0.25", "cpu")
    assert isinstance(encoder, LatentCLIP)
    assert (encoder.name, encoder.merge) == (f"{plain.name}+merge=0.25", 0.25)
    assert encoder.sha256 == plain.sha256
    with pytest.raises(ModelError, match=r"\+merge=half: the share of tokens .* must be a number"):
        load_encoder(f"{converted}+merge=half", "cpu")
