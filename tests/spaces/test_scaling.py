"""One conversion: torch and NumPy, every pair of conventions, and numbers that no scaling has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.errors import LatentsError
from latentguard.spaces import (
    SCALINGS,
    SPACES,
    LatentArray,
    Latents,
    LatentSpace,
    array_preview,
    rgb_preview,
)

GENERATOR = torch.Generator().manual_seed(0)
FLUX2 = SPACES["flux2"].with_batch_norm(
    torch.randn(128, generator=GENERATOR) * 0.3, torch.rand(128, generator=GENERATOR) + 2.5
)
PLAYGROUND = LatentSpace.get("sdxl-playground25")
CONVERTING = [
    *(space for space in SPACES.values() if space.scale is not None),
    *(space for space in SCALINGS.values() if space.scale is not None),
    FLUX2,
    replace(SPACES["sd1"], scale=0.2, shift=0.5),
    replace(SPACES["sd3"], scale=tuple(1.0 + 0.02 * n for n in range(16)), shift=0.1),
    replace(SPACES["flux1"], scale=0.4, shift=tuple(0.01 * n for n in range(64))),
]


@given(
    space=st.sampled_from(CONVERTING),
    scaled=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_torch_and_numpy_convert_alike_and_back(
    space: LatentSpace, scaled: bool, dtype: torch.dtype, rows: int, columns: int, seed: int
) -> None:
    numbers = torch.randn(
        (2, space.channels, 2 * rows, 2 * columns), generator=torch.Generator().manual_seed(seed)
    ).to(dtype)
    latents = Latents(numbers, space, scaled)
    array = LatentArray(numbers.numpy(), space, scaled)
    for wanted in (True, False):
        one, other = latents.to_standard(wanted), array.to_standard(wanted)
        assert (one.space, one.scaled) == (other.space, other.scaled)
        assert one.scaled is wanted
        # Three operations of float32, each to half a unit in the last place.
        torch.testing.assert_close(
            one.tensor.float(), torch.from_numpy(other.array).float(), rtol=1e-6, atol=1e-6
        )
        assert np.array_equal(np.isfinite(one.tensor.numpy()), np.isfinite(other.array))
    exact = Latents(numbers.double(), space, scaled)
    there = exact.to_raw() if scaled else exact.to_scaled()
    back = there.to_scaled() if scaled else there.to_raw()
    torch.testing.assert_close(back.tensor, exact.tensor, rtol=1e-12, atol=1e-12)


@given(
    space=st.sampled_from([space for space in CONVERTING if space.name != "flux2"]),
    other=st.sampled_from([space for space in CONVERTING if space.name != "flux2"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_every_scaling_of_a_space_gives_the_same_standard_latents(
    space: LatentSpace, other: LatentSpace, seed: int
) -> None:
    own = replace(space, scale=other.scale, shift=other.shift) if fits(space, other) else space
    shape = (1, space.channels, 4, 4)
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    expected = Latents(raw, space.name, scaled=False).to_standard().tensor
    found = Latents(raw, own, scaled=False).to_scaled().to_standard().tensor
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def fits(space: LatentSpace, other: LatentSpace) -> bool:
    """Whether a space may have the scaling of another one."""
    if space.channels != other.channels or space.packed_channels != other.packed_channels:
        return False
    try:
        replace(space, scale=other.scale, shift=other.shift)
    except LatentsError:
        return False
    return True


@pytest.mark.parametrize("space", CONVERTING, ids=lambda space: f"{space}-{space.scale!s:.8}")
def test_half_precision_is_converted_in_float32(space: LatentSpace) -> None:
    raw = (torch.randn(1, space.channels, 4, 4, generator=GENERATOR) * 8).half()
    expected = Latents(raw.float(), space, scaled=False).to_standard()
    assert torch.equal(Latents(raw, space, scaled=False).to_standard().tensor, expected.tensor)
    # What keeps its dtype is rounded once, at the end.
    assert torch.equal(space.to_scaled(raw), space.to_scaled(raw.float()).half())
    assert torch.equal(space.to_raw(raw), space.to_raw(raw.float()).half())


def test_what_is_standard_stays_as_it_is() -> None:
    for name, space in SPACES.items():
        latents = Latents(torch.randn(1, space.channels, 4, 4).half(), name, scaled=True)
        assert latents.to_standard() is latents
        array = LatentArray(latents.tensor.numpy(), space, True)
        assert array.to_standard() is array
    close = replace(SPACES["sdxl"], scale=0.130251)  # digits of a config's own
    latents = Latents(torch.randn(1, 4, 4, 4), close, scaled=True)
    assert latents.to_standard() is latents


def test_packed_latents_and_gradients_pass_through() -> None:
    tensor = torch.randn(1, 32, 4, 4, dtype=torch.float64, requires_grad=True)
    raw = Latents(tensor, FLUX2, scaled=False)
    spatial = raw.to_standard()
    assert torch.equal(raw.to_packed().to_standard().tensor, spatial.tensor)
    spatial.tensor.sum().backward()
    assert tensor.grad is not None
    assert torch.isfinite(tensor.grad).all()


def test_previews_do_not_depend_on_the_scaling() -> None:
    raw = torch.randn(1, 4, 8, 8) * 5
    expected = rgb_preview(Latents(raw, "sdxl", scaled=False)).astype(int)
    own = Latents(raw, PLAYGROUND, scaled=False).to_scaled()
    assert np.abs(rgb_preview(own) - expected).max() <= 1
    view = array_preview(LatentArray(own.tensor.numpy(), PLAYGROUND, True))
    assert np.abs(view - expected).max() <= 1


def test_a_published_scaling_has_a_name() -> None:
    sdxl = SPACES["sdxl"]
    config = {"latents_mean": sdxl.mean, "latents_std": sdxl.std, "scaling_factor": 0.5}
    assert LatentSpace.from_vae_config({"latent_channels": 4, **config}) == PLAYGROUND
    assert PLAYGROUND.name == "sdxl"
    with pytest.raises(LatentsError, match=r"use one of .*flux2, .*, sdxl-playground25"):
        LatentSpace.get("playground")


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("sdxl", {"scale": 1e20}, r"scale must be within 0\.0029\d and 4\.71 .*got 1e\+20"),
        ("sdxl", {"scale": 1e-20}, "scale must be within"),
        ("sdxl", {"scale": 0.0}, "scale must be above 0"),
        ("sdxl", {"scale": float("nan")}, "scale must be finite"),
        ("sdxl", {"scale": (0.1, 0.1, 0.1, 100.0)}, r".*got 100$"),
        ("sdxl", {"shift": (400.0, 0.0, 0.0, 0.0)}, r"shift must be within 84\.9 of -1\.66.*400"),
        ("sd3", {"shift": -50.0}, "shift must be within 20 of 0"),
        ("flux1", {"scale": (0.3,) * 63 + (1e3,)}, "scale must be within"),
        ("flux2", {"scale": (1e-9,) * 128, "shift": (0.0,) * 128}, "scale must be within"),
        ("flux2", {"shift": (float("inf"),) * 128}, "shift must be finite"),
    ],
)
def test_numbers_that_no_scaling_has(name: str, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(LatentsError, match=f"^space {name}: {message}"):
        replace(SPACES[name], **numbers)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 1e20},
        {"scaling_factor": 1e-9},
        {"latents_std": "abcd"},
        {"latents_mean": {"a": 1}},
    ],
)
def test_a_vae_config_with_numbers_that_no_scaling_has(config: dict[str, Any]) -> None:
    sdxl = SPACES["sdxl"]
    usual = {"latents_mean": sdxl.mean, "latents_std": sdxl.std, "scaling_factor": 0.5}
    with pytest.raises(LatentsError):
        LatentSpace.from_vae_config({"latent_channels": 4, **usual, **config})


def test_arrays_of_several_scalings_are_no_batch() -> None:
    array = np.zeros((1, 4, 2, 2), np.float32)
    one, other = LatentArray(array, SPACES["sdxl"], True), LatentArray(array, PLAYGROUND, True)
    with pytest.raises(LatentsError, match="several spaces or scalings"):
        LatentArray.cat([one, other])
