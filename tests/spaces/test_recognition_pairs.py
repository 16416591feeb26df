"""No latents are taken for those of another space: every pair of spaces and scalings.

There are no real latents of most spaces here. A picture stands in for them: the four FLUX.2
photographs, or smooth random fields, carried over to a space's channels and statistics. What is
known of a space are its published numbers, where it has any; the rest is drawn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentguard.files import read_arrays
from latentguard.spaces import SCALINGS, SPACES, LatentSpace, recognize
from latentguard.spaces.arrays import unpatchify

Array = NDArray[np.float64]


def _photos() -> Array:
    found = [
        record.latents.array[0].astype(np.float64)
        for record in read_arrays(Path(__file__).parent / "taef2_photos.safetensors")
        if record.latents is not None
    ]
    return np.stack(found)


PHOTOS = _photos()
NAMES = [name for name in SPACES if SPACES[name].statistics_of_vae is None]
READINGS = [(name, scaled) for name in (*NAMES, "sdxl-playground25") for scaled in (True, False)]


def pictures(channels: int, count: int, seed: int, photographs: bool) -> Array:
    """[count, channels, 32, 32] of mean 0 and deviation 1: channels of the photographs in random
    order and sign, or smooth fields with one pattern in common."""
    generator = np.random.default_rng(seed)
    if photographs:
        pool = np.concatenate([PHOTOS, PHOTOS[:, :, ::-1], PHOTOS[:, :, :, ::-1]], axis=1)
        order = generator.permutation(pool.shape[1])
        picked = np.resize(order, channels)
        images = pool[np.resize(np.arange(4), count)][:, picked]
        images = images * generator.choice([-1.0, 1.0], (1, channels, 1, 1))
    else:
        fields = generator.normal(size=(count, channels, 8, 8)).repeat(4, 2).repeat(4, 3)
        common = generator.normal(size=(count, 1, 8, 8)).repeat(4, 2).repeat(4, 3)
        weights = generator.normal(size=(1, channels, 1, 1))
        images = fields + common * weights + 0.3 * generator.normal(size=fields.shape)
    centered = images - images.mean(axis=(2, 3), keepdims=True)
    normal: Array = centered / images.std(axis=(2, 3), keepdims=True)
    return normal


def carried_over(space: LatentSpace, scaled: bool, images: Array, seed: int) -> Array:
    """Pictures with the statistics of a space: its own, else those that its scaling suggests."""
    generator = np.random.default_rng(seed)
    standard = space.standard
    channels = space.channels
    if standard.mean is not None and standard.std is not None:
        mean, std = np.array(standard.mean), np.array(standard.std)
    else:
        scale = np.broadcast_to(np.asarray(space.scale), (channels,))
        shift = np.broadcast_to(np.asarray(space.shift), (channels,))
        # A diffusion model's latents have a deviation of about one.
        mean = shift + generator.normal(size=channels) * 0.3 / scale
        std = generator.uniform(0.6, 1.4, channels) / scale
    offsets = generator.normal(size=(len(images), channels, 1, 1)) * 0.3
    wide = generator.lognormal(0, 0.2, (len(images), channels, 1, 1))
    raw = (images * wide + offsets) * std.reshape(-1, 1, 1) + mean.reshape(-1, 1, 1)
    if not scaled:
        return np.asarray(raw)
    scale, shift = (np.asarray(v, np.float64).reshape(-1, 1, 1) for v in (space.scale, space.shift))
    return np.asarray((raw - shift) * scale)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    reading=st.sampled_from(READINGS),
    count=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    photographs=st.booleans(),
)
def test_no_space_is_taken_for_another(
    reading: tuple[str, bool], count: int, seed: int, photographs: bool
) -> None:
    name, scaled = reading
    space = LatentSpace.get(name)
    images = pictures(space.channels, count, seed, photographs)
    found = recognize(carried_over(space, scaled, images, seed))
    if found.certain:
        assert (found.space, found.scaled) == (space.name, scaled)
        assert space.standard.mean is not None, "nothing is known of its statistics"
        assert name not in SCALINGS or not scaled
    else:
        assert found.question
        alike = [s.name for s in SPACES.values() if s.channels == space.channels]
        for other in alike if found.space is None else []:
            assert f"--space {other}" in found.question


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), scale=st.floats(0.5, 2.0))
@pytest.mark.parametrize("channels", [12, 16, 48, 64, 128])
def test_spaces_without_statistics_are_always_asked(
    channels: int, seed: int, count: int, scale: float
) -> None:
    found = recognize(pictures(channels, count, seed, photographs=True) * scale)
    assert not found.certain
    assert "say --space" in found.question


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.5, 2.0), patches=st.booleans())
def test_pictures_of_one_pattern_are_not_taken_for_flux2(
    seed: int, scale: float, patches: bool
) -> None:
    """Two flat halves, say: every channel shows them, in whatever space."""
    generator = np.random.default_rng(seed)
    pattern = np.where(np.arange(32) < generator.integers(8, 24), 1.0, -1.0) * np.ones((32, 1))
    signs = generator.choice([-1.0, 1.0], (1, 128 if patches else 32, 1, 1))
    noise = 0.05 * generator.normal(size=(1, signs.shape[1], 32, 32))
    assert not recognize((pattern * signs + noise) * scale * 2).certain


def patchified(spatial: Array) -> Array:
    """[B, C, H, W] -> [B, C * 4, H/2, W/2], channel c*4 + dy*2 + dx."""
    count, channels, height, width = spatial.shape
    cells = spatial.reshape(count, channels, height // 2, 2, width // 2, 2)
    cells = cells.transpose(0, 1, 3, 5, 2, 4)
    return cells.reshape(count, channels * 4, height // 2, width // 2)


@pytest.mark.parametrize("index", range(4))
def test_patches_of_flux2_are_recognized_as_its_cells_are(index: int) -> None:
    image = PHOTOS[index : index + 1]
    patches = patchified(image)
    np.testing.assert_array_equal(unpatchify(patches, SPACES["flux2"]), image)
    for factor, scaled in ((1.0, True), (1.75, False)):
        found = recognize(patches * factor)
        assert (found.space, found.scaled) == ("flux2", scaled)
        assert recognize(patches * factor, space="flux2").scaled is scaled


def test_patches_in_another_order_are_a_question() -> None:
    order = np.random.default_rng(3).permutation(128)
    found = recognize(patchified(PHOTOS)[:, order])
    assert not found.certain
    assert "--space flux2 or --space ltxv or --space ltx2" in found.question


@pytest.mark.parametrize("name", ["sana", "hunyuan-video-1.5", "ltxv"])
def test_the_scaling_of_an_unknown_space_is_a_question(name: str) -> None:
    images = pictures(SPACES[name].channels, 2, 0, photographs=True)
    found = recognize(images, space=name)
    assert (found.space, found.scaled) == (name, None)
    assert f"no published statistics tell scaled from raw {name} latents" in found.question
    assert recognize(images, space=name, scaled=True).certain


def test_a_space_of_one_s_own_makes_its_shape_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(SPACES["flux2"], name="mine-32", statistics_of_vae=None, scale=1.0, shift=0.0)
    assert recognize(PHOTOS).certain
    monkeypatch.setitem(SPACES, "mine-32", mine)
    found = recognize(PHOTOS)
    assert not found.certain
    assert "space mine-32 has the same shape" in found.question
    assert recognize(PHOTOS, space="flux2").certain
    assert not recognize(PHOTOS, space="mine-32").certain
