"""Sums that add up, heads in closed form, scores to probabilities, and intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="learning needs torch")

from latentguard.evaluate.metrics import auroc_interval
from latentguard.learn.figures import figures
from latentguard.learn.heads import solve
from latentguard.learn.platt import fit
from latentguard.learn.statistics import Sums

Sizes = st.tuples(*[st.integers(1, 30)] * 2, st.integers(1, 12), st.integers(0, 2**32 - 1))


def vectors(count: int, features: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rows = np.random.default_rng([seed, count, features]).normal(size=(count, features)) + shift
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(Sizes)
@settings(max_examples=60, deadline=None)
def test_sums_of_two_sets_are_those_of_both_together(sizes):
    one, other, features, seed = sizes
    a, b = vectors(one, features, seed), vectors(other, features, seed + 1)
    added, together = Sums.of(a) + Sums.of(b), Sums.of(np.concatenate([a, b]))
    assert added.count == together.count
    np.testing.assert_allclose(added.mean, together.mean, atol=1e-14)
    scatter = [sums.factor.T @ sums.factor for sums in (added, together)]
    np.testing.assert_allclose(scatter[0], scatter[1], atol=1e-12)
    assert len(added.factor) <= min(features, one + other + 1)


@given(Sizes, st.sampled_from([0.1, 0.3, 0.6, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_head_is_that_of_the_textbook_however_many_examples_there_are(sizes, shrinkage):
    one, other, features, seed = sizes
    a, b = vectors(one, features, seed, 0.5), vectors(other, features, seed + 1)
    apart = a.mean(0) - b.mean(0)
    if np.linalg.norm(apart) < 1e-3:
        return
    centered = np.concatenate([a - a.mean(0), b - b.mean(0)])
    scatter = centered.T @ centered / len(centered)
    floor = np.trace(scatter) / features or 1.0
    wanted = np.linalg.solve(
        (1 - shrinkage) * scatter + shrinkage * floor * np.eye(features), apart
    )
    wanted /= wanted @ apart
    head = solve(Sums.of(a), Sums.of(b), shrinkage)
    np.testing.assert_allclose(head.weight, wanted, rtol=1e-6, atol=1e-6 * abs(wanted).max())
    assert head(a).mean() == pytest.approx(1)
    assert head(b).mean() == pytest.approx(0, abs=1e-9)


def test_sums_are_kept_to_the_precision_of_a_file():
    sums = Sums.of(vectors(40, 16, 0))
    kept = Sums.from_arrays("positives", sums.to_arrays("positives"))
    assert kept.count == 40
    np.testing.assert_array_equal(kept.mean, sums.mean)
    np.testing.assert_allclose(kept.factor, sums.factor, atol=1e-6)


def test_equal_means_are_no_head():
    rows = vectors(5, 8, 0)
    with pytest.raises(ValueError, match="the two means are the same"):
        solve(Sums.of(rows), Sums.of(rows), 0.5)


def test_a_scale_agrees_with_scikit_learn_on_both_sides_alike():
    linear = pytest.importorskip("sklearn.linear_model", reason="compares with scikit-learn")
    rng = np.random.default_rng(0)
    high, low = rng.normal(2, 1, 400), rng.normal(0, 1, 900)
    scores, sides = np.concatenate([high, low])[:, None], np.repeat([1, 0], [400, 900])
    model = linear.LogisticRegression(C=1e9, class_weight="balanced", tol=1e-10)
    model.fit(scores, sides)
    scale = fit(high, low)
    # Smoothed targets are the difference.
    assert scale.slope == pytest.approx(model.coef_[0, 0], rel=0.05)
    assert scale.offset == pytest.approx(model.intercept_[0], rel=0.05)


@pytest.mark.parametrize(
    ("high", "low"), [([3.0], [1.0]), ([1, 2, 3], [-1, -2]), ([1e6, 2e6], [0.0])]
)
def test_sides_that_do_not_overlap_have_a_finite_scale(high, low):
    scale = fit(high, low)
    assert 0 < scale.slope < np.inf
    assert np.isfinite(scale.offset)
    assert min(high) * scale.slope + scale.offset > 0 > max(low) * scale.slope + scale.offset


def test_scores_that_rank_the_negatives_higher_tell_nothing():
    assert fit([0.0, 0.1], [1.0, 2.0]).slope == 0


@given(st.floats(0, 1), st.integers(1, 60), st.integers(1, 900))
@settings(max_examples=100, deadline=None)
def test_an_interval_of_auroc_holds_it_and_is_no_point(area, positives, negatives):
    found = auroc_interval(area, positives, negatives)
    assert 0 <= found.low <= area <= found.high <= 1
    assert found.high - found.low > 0


def test_an_interval_of_auroc_covers():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        high, low = rng.normal(1.645, 1, 12) / 10, rng.normal(0, 1, 300) / 10
        told = figures(high, low, 10.0).auroc
        held += told.low <= 0.8776 <= told.high  # of deviates 1.645 apart
    assert held / 300 > 0.93


def test_rates_that_there_are_too_few_negatives_for_are_not_told():
    told = figures([1.0, 2.0], np.linspace(-1, 0.5, 98), 10.0)
    assert told.at_rates == ()
    assert told.needed == ((0.01, 99), (0.001, 999))
    told = figures([1.0, 2.0], np.linspace(-1, 0.5, 99), 10.0)
    assert [one.rate for one in told.at_rates] == [0.01]
    assert told.at_rates[0].margin > 0.5
