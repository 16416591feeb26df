"""Spaces with a mean and a deviation of each channel: both directions, as plain formulas say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.errors import LatentsError
from latentguard.spaces import SPACES, LatentArray, Latents

NORMALIZED = {
    # Space: the factor behind the division by the deviation.
    "wan21": 1.0,
    "wan22": 1.0,
    "qwen-image-2.1": 1.0,
    "mochi": 1.0,
    "cosmos1": 0.5,
}
# Of the largest value: conversions are computed in float32; results in half precision are rounded.
CLOSE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def statistics(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float64, as the file gives them."""
    import json

    from latentguard.spaces.records import DATA

    scaling = json.loads((DATA / f"{name}.json").read_text("utf-8"))["scaling"]
    return np.array(scaling["mean"]), np.array(scaling["std"])


@pytest.mark.parametrize("dtype", CLOSE)
@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(sorted(NORMALIZED)),
    count=st.integers(1, 3),
    framed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_both_directions(
    dtype: torch.dtype, name: str, count: int, framed: bool, seed: int
) -> None:
    space = SPACES[name]
    mean, std = (value.reshape(-1, 1, 1) for value in statistics(name))
    factor = NORMALIZED[name]
    random = np.random.default_rng(seed)
    raw64 = random.normal(size=(count, space.channels, 4, 6)) * std + mean
    given_raw = torch.from_numpy(raw64).to(dtype)
    exact_raw = given_raw.double().numpy()
    scaled64 = (exact_raw - mean) * factor / std
    shape = (count, space.channels, 1, 4, 6) if framed else raw64.shape
    scaled = space.to_scaled(given_raw.reshape(shape))
    assert (scaled.dtype, scaled.shape) == (dtype, shape)
    tolerance = CLOSE[dtype] * np.abs(scaled64).max()
    np.testing.assert_allclose(
        scaled.double().numpy().reshape(raw64.shape), scaled64, rtol=0, atol=tolerance
    )
    exact_scaled = scaled.double().numpy().reshape(raw64.shape)
    back = space.to_raw(scaled)
    np.testing.assert_allclose(
        back.double().numpy().reshape(raw64.shape),
        exact_scaled * std / factor + mean,
        rtol=0,
        atol=CLOSE[dtype] * np.abs(exact_raw).max(),
    )


@pytest.mark.parametrize("name", NORMALIZED)
def test_arrays_and_tensors_convert_alike(name: str) -> None:
    raw = torch.randn(2, SPACES[name].channels, 4, 4)
    array = LatentArray(raw.numpy(), SPACES[name], scaled=False).to_scaled()
    tensor = Latents(raw, name, scaled=False).to_scaled()
    np.testing.assert_array_equal(array.array, tensor.tensor.numpy())


def test_frames_that_look_like_channels_are_not_taken_for_them() -> None:
    with pytest.raises(LatentsError, match=r"must be \[B, 16, 1, H, W\], got \[1, 16, 16, 8, 8\]"):
        SPACES["wan21"].to_scaled(torch.zeros(1, 16, 16, 8, 8))


def test_statistics_of_the_vae() -> None:
    ltxv = SPACES["ltxv"]
    with pytest.raises(
        LatentsError, match=r"need the statistics of the pipeline's VAE.*with_mean_st"
    ):
        ltxv.to_raw(torch.zeros(1, 128, 4, 4))
    space = ltxv.with_mean_std([0.5] * 128, torch.full((128,), 2.0))
    np.testing.assert_allclose(space.to_scaled(torch.full((1, 128, 4, 4), 4.5)).numpy(), 2.0)
    for mean, std in (([0.0], [1.0]), ([0.0] * 128, [0.0] * 128)):
        with pytest.raises(LatentsError, match=r"mean and std must hold 128|std must be above 0"):
            ltxv.with_mean_std(mean, std)
    with pytest.raises(LatentsError, match=r"ltxv is not batch-normalized"):
        ltxv.with_batch_norm([0.0] * 128, [1.0] * 128)
