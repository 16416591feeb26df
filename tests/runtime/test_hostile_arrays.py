"""Arrays that are no latents: one sentence says so; what is not a number is never allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from latentguard.errors import LatentsError, ModelError
from latentguard.runtime import Guard
from latentguard.spaces import LatentArray, LatentSpace

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ONE = (1, 32, 32, 32)


class NoArray:
    def __array__(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 4, 32, 32), np.float32), r"must be \[B, 32, H, W\], got \[1, 4, 32, 32\]"),
        (np.zeros((32, 32, 32), np.float32), "packed latents do not carry their size"),
        (np.zeros((32, 32), np.float32), r"must be \[B, 32, H, W\], got \[32, 32\]"),
        (np.zeros((1, 1, 32, 32, 32), np.float32), "must be"),
        (np.float32(1), r"must be \[B, 32, H, W\], got \[\]"),
        (np.zeros((1, 32, 16, 32), np.float32), "was exported for 32x32 latent cells, got 16x32"),
        (np.zeros((0, 32, 32, 32), np.float32), r"must not be empty, got shape \[0, 32, 32, 32\]"),
        (np.zeros((1, 32, 0, 32), np.float32), "must not be empty"),
        (np.zeros(ONE, np.int8), "must be floating point, got int8"),
        (np.zeros(ONE, np.uint16), "must be floating point, got uint16"),
        (np.zeros(ONE, bool), "must be floating point, got bool"),
        (np.zeros(ONE, np.complex64), "must be floating point, got complex64"),
        (np.zeros(ONE, object), "must be floating point, got object"),
        (np.zeros(ONE, "S4"), "must be floating point"),
        (np.zeros(ONE, [("a", "f4")]), "must be floating point"),
        (np.zeros(ONE, "M8[s]"), "must be floating point, got datetime64"),
        ([[1.0], [1.0, 2.0]], "must be a NumPy array, list is not one"),
        (None, "must be floating point, got object"),
        ("latents", "must be floating point"),
        ({}, "must be floating point, got object"),
        (NoArray(), "must be a NumPy array, NoArray is not one: not today"),
        (np.ma.masked_values(np.zeros(ONE, np.float32), 0), "this array masks some"),
    ],
)
def test_arrays_that_are_no_latents(guard: Guard, array: Any, message: str) -> None:
    for call in (guard.scan, guard.scores, guard.embed, guard.heatmaps):
        with pytest.raises(LatentsError, match=message) as caught:
            call(array)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "height", "width", "message"),
    [
        ((1, 256, 128), None, 32, "give height and width"),
        ((1, 256, 128), 32, None, "give height and width"),
        ((1, 256, 128), 16, 32, r"must be \[B, 128, 128\], got \[1, 256, 128\]"),
        ((1, 256, 128), 31, 33, "even numbers"),
        ((1, 256, 128), 0, 0, "even numbers"),
        ((1, 256, 128), -32, -32, "even numbers"),
        ((1, 256, 128), 2**40, 2**40, "must be"),
        ((1, 256, 64), 32, 32, r"must be \[B, 256, 128\]"),
        (ONE, 16, 16, "height and width say 16x16 latent cells, the tensor is 32x32"),
    ],
)
def test_packed_latents_of_another_size(
    guard: Guard, shape: tuple[int, ...], height: int | None, width: int | None, message: str
) -> None:
    with pytest.raises(LatentsError, match=message):
        guard.scan(np.zeros(shape, np.float32), height=height, width=width)


@pytest.mark.parametrize("sides", [(32.0, 32.0), ("32", "32"), (np.float64(32), 32)])
def test_sides_that_are_no_whole_numbers(guard: Guard, sides: tuple[Any, Any]) -> None:
    with pytest.raises(LatentsError, match="height and width must be whole numbers, got"):
        guard.scan(np.zeros((1, 256, 128), np.float32), height=sides[0], width=sides[1])


def test_an_array_that_could_be_masked_and_is_not(guard: Guard, arrays: np.ndarray) -> None:
    expected = [verdict.to_dict() for verdict in guard.scan(arrays[:2])]
    found = guard.scan(np.ma.masked_array(arrays[:2]))
    assert [verdict.to_dict() for verdict in found] == expected


def test_latents_that_carry_a_convention_that_is_none(arrays: np.ndarray) -> None:
    flux2 = LatentSpace.get("flux2")
    with pytest.raises(LatentsError, match="this array masks some"):
        LatentArray(np.ma.masked_greater(arrays[:1], 1), flux2, True)
    with pytest.raises(LatentsError, match=r"scaled must be True .* got 'false'"):
        LatentArray(arrays[:1], flux2, "false")  # type: ignore[arg-type]


def test_an_image_over_the_limit(artifact: Any) -> None:
    # A file of one size is of no use where its images are too large.
    with pytest.raises(ModelError, match="32x32 latent cells, over the limit of 1000"):
        Guard(artifact, threads=1, max_cells=1000)
    small = Guard(artifact, threads=1, max_cells=1024)
    wide = np.zeros((1, 32, 32, 33), np.float32)
    with pytest.raises(LatentsError, match=r"32x33 latent cells is over the limit of 1024 \(max_c"):
        small.scan(wide)
    # A view of one number, as large as a thousand pictures of 8,192 pixels.
    huge = np.broadcast_to(np.float32(0), (1000, 32, 1024, 1024))
    with pytest.raises(LatentsError, match="over the limit of 1024"):
        small.scan(huge)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 1e30, -1.1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_number_that_is_none_blocks_its_image_only(
    guard: Guard, arrays: np.ndarray, value: float, dtype: type[np.floating]
) -> None:
    batch = arrays[:3].astype(dtype)
    with np.errstate(over="ignore"):
        batch[1, 31, 5, 7] = value
    verdicts = guard.scan(batch)
    alone = guard.scan(arrays[:3])
    assert [v.decision for v in verdicts] == [alone[0].decision, "block", alone[2].decision]
    assert [v.error is None for v in verdicts] == [True, False, True]
    assert "not finite" in str(verdicts[1].error)
    assert np.isnan(guard.embed(batch)[1]).all()
    assert np.isfinite(guard.embed(batch)[[0, 2]]).all()
    assert np.isnan(guard.heatmaps(batch)[1]).all()


def test_all_of_them_at_once(guard: Guard) -> None:
    verdicts = guard.scan(np.full((2, 32, 32, 32), np.nan, np.float16))
    assert [v.decision for v in verdicts] == ["block", "block"]


@given(scale=st.floats(1e-30, 1e30), seed=st.integers(0, 100))
@QUICK
def test_any_amplitude_gives_scores_or_an_error(guard: Guard, scale: float, seed: int) -> None:
    array = np.random.default_rng(seed).standard_normal(ONE) * scale
    (verdict,) = guard.scan(array)
    assert verdict.error is None or verdict.decision == "block"
    for concept in verdict.concepts:
        assert np.isfinite(concept.margin)
        assert 0 <= concept.probability <= 1


@given(data=st.data())
@QUICK
def test_any_array_is_judged_or_refused(guard: Guard, data: st.DataObject) -> None:
    dtype = data.draw(npst.scalar_dtypes() | st.just(np.dtype(object)), label="dtype")
    shape = data.draw(
        st.just(ONE)
        | st.just((2, 32, 32, 32))
        | npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=33),
        label="shape",
    )
    array = np.zeros(shape, dtype)
    if dtype.kind == "f" and array.size:
        element = data.draw(st.floats(width=32), label="element")
        with np.errstate(over="ignore"):
            array.reshape(-1)[data.draw(st.integers(0, array.size - 1))] = element
    if dtype.kind != "f" or shape[1:] != (32, 32, 32) or not array.size:
        with pytest.raises(LatentsError, match=r"\A.+\Z"):
            guard.scan(array)
        return
    verdicts = guard.scan(array)
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).reshape(len(array), -1).all(axis=1)
    assert len(verdicts) == len(array)
    for verdict, good in zip(verdicts, finite, strict=True):
        assert good or verdict.decision == "block"
