"""raw <-> scaled and spatial <-> packed: exact, and the same as diffusers does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.errors import LatentsError
from latentguard.spaces import SPACES, BatchNorm, Latents, LatentSpace

GENERATOR = torch.Generator().manual_seed(0)
STATISTICS = BatchNorm(
    torch.randn(128, generator=GENERATOR, dtype=torch.float64).mul(0.1).tolist(),
    torch.rand(128, generator=GENERATOR, dtype=torch.float64).add(2.5).tolist(),
)


def batch(space: LatentSpace, height: int = 6, width: int = 4, count: int = 2) -> torch.Tensor:
    return torch.randn(
        count, space.channels, height, width, generator=GENERATOR, dtype=torch.float64
    )


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> LatentSpace:
    found = SPACES[request.param]
    if found.statistics_of_vae == "mean_std":
        return found.with_mean_std([0.1] * found.channels, [1.7] * found.channels)
    return found.with_batch_norm(*STATISTICS) if found.name == "flux2" else found


def playground() -> LatentSpace:
    sdxl = SPACES["sdxl"]
    config = {"latents_mean": sdxl.mean, "latents_std": sdxl.std, "scaling_factor": 0.5}
    return LatentSpace.from_vae_config({"latent_channels": 4, **config})


# 4 ulp of the largest value: one multiplication, one addition and their inverses.
EXACT: dict[str, Any] = {"rtol": 1e-14, "atol": 1e-14}


def test_round_trip_is_exact_in_float64(space: LatentSpace) -> None:
    raw = batch(space) * 5 + 1
    torch.testing.assert_close(space.to_raw(space.to_scaled(raw)), raw, **EXACT)
    torch.testing.assert_close(space.to_scaled(space.to_raw(raw)), raw, **EXACT)


def test_scaled_is_raw_minus_shift_times_scale() -> None:
    raw = batch(SPACES["sd3"])
    torch.testing.assert_close(SPACES["sd3"].to_scaled(raw), (raw - 0.0609) * 1.5305, **EXACT)
    raw = batch(SPACES["sdxl"])
    torch.testing.assert_close(SPACES["sdxl"].to_scaled(raw), raw * 0.13025, **EXACT)
    mean = torch.tensor(SPACES["sdxl"].mean, dtype=torch.float64).view(4, 1, 1)
    std = torch.tensor(SPACES["sdxl"].std, dtype=torch.float64).view(4, 1, 1)
    torch.testing.assert_close(playground().to_scaled(raw), (raw - mean) * 0.5 / std, **EXACT)


def test_gradients_pass_through() -> None:
    space = SPACES["flux2"].with_batch_norm(*STATISTICS)
    raw = batch(space, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: space.to_packed(space.to_scaled(x)), raw)


@pytest.mark.parametrize("name", ["flux1", "flux2"])
def test_packing_round_trip(name: str) -> None:
    space = SPACES[name]
    spatial = batch(space)
    tokens = space.to_packed(spatial)
    assert tokens.shape == (2, 6, space.packed_channels)
    assert torch.equal(space.to_spatial(tokens, 6, 4), spatial)
    # c*4 + dy*2 + dx of the token (row, column) is cell (2 row + dy, 2 column + dx) of channel c.
    assert tokens[1, 1 * 2 + 1, 5 * 4 + 1 * 2 + 0] == spatial[1, 5, 3, 2]


def test_flux1_packs_as_diffusers_does() -> None:
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux", reason="needs diffusers")
    spatial = batch(SPACES["flux1"], 8, 12)
    tokens = flux.FluxPipeline._pack_latents(spatial, 2, 16, 8, 12)
    assert torch.equal(SPACES["flux1"].to_packed(spatial), tokens)
    # That one counts pixels.
    back = flux.FluxPipeline._unpack_latents(tokens, 64, 96, 8)
    assert torch.equal(SPACES["flux1"].to_spatial(tokens, 8, 12), back)


def test_flux2_converts_as_diffusers_does() -> None:
    module = pytest.importorskip(
        "diffusers.pipelines.flux2.pipeline_flux2", reason="needs diffusers with FLUX.2"
    )
    import diffusers

    pipeline = module.Flux2Pipeline
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1
    )
    vae.bn.running_mean.copy_(torch.tensor(STATISTICS.mean))
    vae.bn.running_var.copy_(torch.tensor(STATISTICS.var))
    space = LatentSpace.from_vae_config(vae.config)
    assert space == SPACES["flux2"]
    statistics = BatchNorm.from_vae(vae)
    assert statistics.eps == vae.config.batch_norm_eps == 1e-4

    raw = batch(space, 8, 12).float()
    patched = pipeline._patchify_latents(raw)
    assert torch.equal(space.patchify(raw), patched)
    assert torch.equal(space.unpatchify(patched), pipeline._unpatchify_latents(patched))
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    tokens = pipeline._pack_latents((patched - mean) / std)

    ours = Latents(raw, "flux2", scaled=False).to_scaled(statistics).to_packed()
    # float32, division against multiplication by the reciprocal; measured worst 2.4e-7.
    torch.testing.assert_close(ours.tensor, tokens, rtol=1e-6, atol=1e-6)
    # torch's own batch norm is what the training of that VAE ran.
    normalized = vae.bn.eval()(patched)
    torch.testing.assert_close(
        space.patchify(ours.to_spatial().tensor), normalized, rtol=1e-5, atol=1e-6
    )


@given(
    name=st.sampled_from(["flux1", "flux2"]),
    count=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_every_route_commutes(
    name: str, count: int, rows: int, columns: int, scaled: bool, seed: int
) -> None:
    space = SPACES[name]
    if name == "flux2":
        space = space.with_batch_norm(*STATISTICS)
    generator = torch.Generator().manual_seed(seed)
    shape = (count, space.channels, 2 * rows, 2 * columns)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    start = Latents(tensor, space, scaled, ids=[str(i) for i in range(count)])
    one = start.to_packed().to_raw().to_scaled().to_spatial()
    two = start.to_scaled()
    assert one.ids == two.ids == start.ids
    assert one.space == two.space
    torch.testing.assert_close(one.tensor, two.tensor, rtol=1e-12, atol=1e-12)


def test_flux2_without_statistics_says_what_it_needs() -> None:
    latents = Latents(batch(SPACES["flux2"]), "flux2", scaled=True)
    with pytest.raises(LatentsError, match=r"raw latents need the batch-norm statistics.*from_vae"):
        latents.to_raw()
    assert latents.to_scaled() is latents
    assert latents.to_raw(STATISTICS).to_scaled().tensor.shape == latents.tensor.shape


def test_what_a_conversion_refuses() -> None:
    flux2 = SPACES["flux2"]
    with pytest.raises(LatentsError, match=r"must hold 128 numbers .* got 3 and 128"):
        flux2.with_batch_norm([0.0] * 3, [1.0] * 128)
    with pytest.raises(LatentsError, match="must not be negative or NaN"):
        flux2.with_batch_norm([0.0] * 128, [float("nan")] * 128)
    with pytest.raises(LatentsError, match="sdxl is not batch-normalized"):
        SPACES["sdxl"].with_batch_norm([0.0] * 4, [1.0] * 4)
    with pytest.raises(LatentsError, match=r"even numbers of latent cells.* got 5x4"):
        flux2.with_batch_norm(*STATISTICS).to_raw(torch.zeros(1, 32, 5, 4))
    with pytest.raises(LatentsError, match=r"even numbers of latent cells.* got 5x4"):
        flux2.to_packed(torch.zeros(1, 32, 5, 4))
    with pytest.raises(LatentsError, match="sdxl has no packed layout"):
        SPACES["sdxl"].to_packed(torch.zeros(1, 4, 4, 4))
    with pytest.raises(LatentsError, match=r"\[B, 4, H, W\], got \[1, 16, 4, 4\]"):
        SPACES["sdxl"].to_raw(torch.zeros(1, 16, 4, 4))
    with pytest.raises(LatentsError, match=r"64x64 cells must be \[B, 1024, 64\].*pixels / 8"):
        SPACES["flux1"].to_spatial(torch.zeros(1, 4096, 64), 64, 64)
    with pytest.raises(LatentsError, match="no batch-norm statistics"):
        BatchNorm.from_vae(object())
