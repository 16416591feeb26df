"""The PNG writer against Pillow, the heat ramp, the outlines."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from latentguard.scan.image import LEVELS, data_uri, heat_png, outline, ramp, rgb_png


def decoded(png: bytes, mode: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert(mode))


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (128, 96)])
def test_rgb_png_is_lossless(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(decoded(rgb_png(pixels), "RGB"), pixels)


def test_large_previews_are_averaged_down() -> None:
    pixels = np.zeros((256, 130, 3), np.uint8)
    pixels[::2] = 200
    small = decoded(rgb_png(pixels), "RGB")
    assert small.shape == (128, 65, 3)
    assert np.all(small == 100)


def test_heat_runs_from_low_to_high_and_nan_is_low() -> None:
    heat = np.array([[-5.0, -1.0, 0.0, 1.0, 5.0, np.nan]])
    picture = decoded(heat_png(heat, -1.0, 1.0), "RGBA")
    expected = ramp()[[0, 0, LEVELS // 2, LEVELS - 1, LEVELS - 1, 0]]
    assert np.array_equal(picture[0], expected)


def test_heat_grows_lighter_over_any_picture() -> None:
    """Order must survive without color: over gray, luminance never falls along the ramp."""
    colors = ramp().astype(float)
    alpha = colors[:, 3:] / 255
    for gray in (40.0, 128.0, 200.0):
        shown = colors[:, :3] * alpha + gray * (1 - alpha)
        luminance = shown @ [0.2126, 0.7152, 0.0722]
        under = luminance[: LEVELS // 2 + 1]
        assert np.all(np.diff(under) > -1.0)
        assert luminance[-1] > luminance[0] + 60


def test_data_uri_round_trips() -> None:
    png = rgb_png(np.zeros((2, 2, 3), np.uint8))
    kind, _, data = data_uri(png).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == png


def test_outline_is_the_border_of_the_mask() -> None:
    assert outline(np.zeros((3, 3), bool)) == ""
    path = outline(np.array([[False, True], [False, True]]))
    assert path == "M1 0H2M1 2H2M1 0V2M2 0V2"


@pytest.mark.parametrize("seed", range(5))
def test_outline_has_one_edge_per_change(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 5)) > 0.6
    lengths = [
        abs(int(end) - int(x if kind == "H" else y))
        for x, y, kind, end in re.findall(r"M(\d+) (\d+)([HV])(\d+)", outline(mask))
    ]
    padded = np.pad(mask, 1).astype(int)
    changes = np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
    assert sum(lengths) == changes
