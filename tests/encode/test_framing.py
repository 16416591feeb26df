"""Which part of a picture is encoded, at which size."""

from __future__ import annotations

import numpy as np
import pytest
from encode_helpers import photo
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.encode.framing import MAX_SIDE, Crop, Framing
from latentguard.errors import LatentsError, UsageError


@pytest.mark.parametrize(
    ("size", "crop", "shape", "box"),
    [
        ("32", "center", (32, 32), (25, 0, 75, 50)),
        ("64x32", "center", (32, 64), (0, 0, 100, 50)),
        ("32x64", "center", (64, 32), (37.5, 0, 62.5, 50)),
        ("32", "none", (32, 64), (0, 0, 100, 50)),
        ("40x40", "none", (16, 40), (0, 5, 100, 45)),  # 40 x 20 fits, and 20 becomes 16
        ("32x64", "resize", (64, 32), (0, 0, 100, 50)),
        ("original", "center", (48, 96), (2, 1, 98, 49)),
        ("original", "none", (48, 96), (2, 1, 98, 49)),
    ],
)
def test_what_is_taken_of_a_picture(
    size: str, crop: Crop, shape: tuple[int, int], box: tuple[float, ...]
) -> None:
    pixels, found = Framing.parse(size, crop).apply(photo(0, (100, 50)))
    assert (pixels.shape, pixels.dtype) == ((*shape, 3), np.uint8)
    assert found == pytest.approx(box)


def test_pixels_of_the_original_size_are_what_they_were() -> None:
    image = photo(0, (101, 53))
    pixels, (left, top, right, bottom) = Framing.parse("original").apply(image)
    wanted = np.asarray(image)[int(top) : int(bottom), int(left) : int(right)]
    assert (pixels == wanted).all()


@pytest.mark.parametrize(
    ("size", "crop", "says"),
    [
        ("500", "center", "multiple of 16 pixels.*got 500: 496 is the nearest"),
        ("big", "center", "a number of pixels, WIDTHxHEIGHT or original, got 'big'"),
        ("0", "center", "from 16 to 8192"),
        ("16x9000", "resize", "from 16 to 8192 pixels, got 9000"),
        ("original", "resize", "stretches to a size"),
    ],
)
def test_sizes_that_cannot_be(size: str, crop: Crop, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Framing.parse(size, crop, 16)


def test_results_of_no_or_too_many_pixels() -> None:
    with pytest.raises(LatentsError, match="both must be from 8 to 8192"):
        Framing.parse("512", "none").apply(photo(0, (500, 2)))
    with pytest.raises(LatentsError, match="4 x 3 pixels, of which 0 x 0"):
        Framing.parse("original").apply(photo(0, (4, 3)))


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.one_of(
        st.none(), st.integers(2, 12).map(lambda n: 8 * n),
        st.tuples(st.integers(2, 12).map(lambda n: 8 * n), st.integers(2, 12).map(lambda n: 8 * n)),
    ),
    crop=st.sampled_from(["center", "none", "resize"]),
)  # fmt: skip
def test_any_picture_in_any_frame(
    width: int, height: int, size: tuple[int, int] | int | None, crop: Crop
) -> None:
    if size is None and crop == "resize":
        return
    framing = Framing(size, crop)
    try:
        pixels, (left, top, right, bottom) = framing.apply(photo(0, (width, height)))
    except LatentsError:
        assert not framing.uniform
        return
    rows, columns, _ = pixels.shape
    assert rows % 8 == columns % 8 == 0
    assert 0 < max(rows, columns) <= MAX_SIDE
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6
    if framing.uniform:
        assert (columns, rows) == (size if isinstance(size, tuple) else (size, size))
    if crop != "resize":  # what is seen keeps its shape
        assert (right - left) / columns == pytest.approx((bottom - top) / rows)
