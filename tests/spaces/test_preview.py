"""The RGB view: against the pictures where there are any, else against its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from latentguard.errors import LatentsError
from latentguard.files import load_latents
from latentguard.spaces import (
    SPACES,
    BatchNorm,
    LatentArray,
    Latents,
    LatentSpace,
    array_preview,
    rgb_preview,
)
from latentguard.spaces.preview import linear_rgb

PHOTOS = Path(__file__).parent / "taef2_photos.safetensors"


def picture(name: str) -> np.ndarray:
    """The photograph behind PHOTOS at one pixel per cell, [-1, 1]."""
    data = pytest.importorskip("skimage.data", reason="needs the dev extra")
    image = pytest.importorskip("PIL.Image", reason="needs the dev extra")
    whole = image.fromarray(getattr(data, name)()).convert("RGB")
    side = min(whole.size)
    left, top = ((length - side) // 2 for length in whole.size)
    crop = whole.crop((left, top, left + side, top + side))
    small = crop.resize((256, 256), image.Resampling.BICUBIC).resize((32, 32), image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 127.5 - 1


def test_flux2_view_shows_the_pictures() -> None:
    latents = load_latents(PHOTOS)
    assert latents.ids is not None
    rgb = linear_rgb(latents).permute(0, 2, 3, 1).double().numpy()
    for name, view in zip(latents.ids, rgb, strict=True):
        true = picture(name)
        # Measured: astronaut 0.88, coffee 0.81, rocket 0.78, cat 0.75; with another's picture less
        # than 0.2. The view is one number a cell and color, of a latent that holds 32.
        assert np.corrcoef(true.ravel(), view.ravel())[0, 1] > 0.7, name


@pytest.mark.parametrize("name", [s.name for s in SPACES.values() if s.rgb_view is not None])
def test_shape_type_and_definition(name: str) -> None:
    space = SPACES[name]
    latents = Latents(torch.randn(2, space.channels, 4, 6, dtype=torch.float16), space, scaled=True)
    view = rgb_preview(latents)
    assert view.shape == (2, 4, 6, 3)
    assert view.dtype == np.uint8
    factors, bias = np.array(space.rgb_factors), np.array(space.rgb_bias)
    expected = np.einsum("bchw,cr->bhwr", latents.tensor.double().numpy(), factors) + bias
    expected = np.clip((expected + 1) * 127.5, 0, 255)
    # uint8 rounding, half a level, and float32 near a rounding boundary.
    assert np.abs(view - expected).max() <= 0.5 + 1e-3


def test_a_space_without_a_view_says_so() -> None:
    latents = Latents(torch.zeros(1, 32, 8, 8), "sana", scaled=True)
    for preview in (
        rgb_preview,
        lambda x: array_preview(LatentArray(x.tensor.numpy(), x.space, True)),
    ):
        with pytest.raises(LatentsError, match="space sana has no RGB view"):
            preview(latents)


@pytest.mark.parametrize("name", ["sdxl", "sd1", "sd3", "flux1", "wan21", "wan22", "mochi"])
def test_raw_and_scaled_look_the_same(name: str) -> None:
    scaled = Latents(torch.randn(1, SPACES[name].channels, 8, 8), name, scaled=True)
    assert np.abs(rgb_preview(scaled).astype(int) - rgb_preview(scaled.to_raw())).max() <= 1


def test_other_scalings_of_a_space_look_the_same() -> None:
    sdxl = SPACES["sdxl"]
    playground = LatentSpace.from_vae_config(
        {
            "latent_channels": 4,
            "scaling_factor": 0.5,
            "latents_mean": sdxl.mean,
            "latents_std": sdxl.std,
        }
    )
    raw = torch.randn(1, 4, 8, 8) * 5
    one = rgb_preview(Latents(raw, sdxl, scaled=False))
    two = rgb_preview(Latents(playground.to_scaled(raw), playground, scaled=True))
    assert np.abs(one.astype(int) - two).max() <= 1


def test_raw_flux2_needs_statistics() -> None:
    latents = Latents(torch.randn(1, 32, 8, 8), "flux2", scaled=True)
    raw = latents.to_raw(BatchNorm([0.1] * 128, [3.0] * 128))
    assert np.abs(rgb_preview(raw).astype(int) - rgb_preview(latents.to_packed())).max() <= 1
    with pytest.raises(LatentsError, match="batch-norm statistics"):
        rgb_preview(Latents(raw.tensor, "flux2", scaled=False))


def test_upscaling() -> None:
    latents = load_latents(PHOTOS)[:1]
    small, large = rgb_preview(latents), rgb_preview(latents, upscale=8)
    assert large.shape == (1, 256, 256, 3)
    assert np.array_equal(large[:, ::8, ::8], small)
    smooth = rgb_preview(latents, upscale=8, mode="bicubic")
    assert np.abs(smooth[:, 4::8, 4::8].astype(int) - small).mean() < 10
    assert (
        np.abs(np.diff(smooth.astype(int), axis=1)).max()
        < np.abs(np.diff(large.astype(int), axis=1)).max()
    )


def test_out_of_range_is_clipped_and_nan_is_black() -> None:
    tensor = torch.full((1, 4, 2, 2), 1e4)
    tensor[0, :, 0, 0] = float("nan")
    view = rgb_preview(Latents(tensor, "sdxl", scaled=True))
    assert view[0, 0, 0].tolist() == [0, 0, 0]
    assert set(np.unique(view)) <= {0, 255}


def test_bad_options() -> None:
    latents = Latents(torch.zeros(1, 4, 2, 2), "sdxl", scaled=True)
    with pytest.raises(LatentsError, match="1 to 64, got 0"):
        rgb_preview(latents, upscale=0)
    with pytest.raises(LatentsError, match="nearest or bicubic, got 'area'"):
        rgb_preview(latents, mode="area")  # type: ignore[arg-type]
