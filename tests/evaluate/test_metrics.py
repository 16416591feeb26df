"""The metrics against scikit-learn's, ties and bootstrap included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from latentguard import evaluate
from latentguard.evaluate import metrics


def _labels(positives, negatives):
    return np.r_[np.ones(len(positives)), np.zeros(len(negatives))], np.r_[positives, negatives]


# A few distinct values, so that ties within and across the sides are common.
scores = st.lists(st.integers(-5, 5).map(lambda i: i / 4), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(scores, scores)
def test_equal_to_scikit_learn(positives, negatives):
    truth, values = _labels(positives, negatives)
    counts = metrics.count(positives, negatives)
    # Sums of at most 80 products of float64 near 1: 1e-12 is a thousand roundings.
    assert metrics.auroc(counts) == pytest.approx(sk.roc_auc_score(truth, values), abs=1e-12)
    assert metrics.average_precision(counts) == pytest.approx(
        sk.average_precision_score(truth, values), abs=1e-12
    )
    fpr, tpr, thresholds = sk.roc_curve(truth, values, drop_intermediate=False)
    np.testing.assert_allclose(counts.fpr, fpr[1:], atol=1e-12)
    np.testing.assert_allclose(counts.recall, tpr[1:], atol=1e-12)
    np.testing.assert_array_equal(counts.thresholds, thresholds[1:])
    at_recall = fpr[np.flatnonzero(tpr >= 0.95 - 1e-12)[0]]
    assert metrics.fpr_at_recall(counts) == pytest.approx(at_recall, abs=1e-12)


def test_recall_is_reached_exactly():
    """19 of 20 is 95 %: the twentieth positive, below all negatives, is not needed."""
    positives = np.r_[np.linspace(1, 2, 19), -1.0]
    assert metrics.fpr_at_recall(metrics.count(positives, np.zeros(10))) == 0
    assert metrics.fpr_at_recall(metrics.count(positives, np.zeros(10)), 0.96) == 1


def test_resampling_equals_the_metric_of_the_drawn_sample():
    rng = np.random.default_rng(0)
    positives, negatives = rng.normal(1, 1, 30).round(1), rng.normal(0, 1, 50).round(1)
    drawn = [
        rng.multinomial(len(s), np.full(len(s), 1 / len(s)), 5) for s in (positives, negatives)
    ]
    counts = metrics._count(positives, negatives, (drawn[0], drawn[1]))
    for i in range(5):
        truth, values = _labels(
            np.repeat(positives, drawn[0][i]), np.repeat(negatives, drawn[1][i])
        )
        assert metrics.auroc(counts)[i] == pytest.approx(sk.roc_auc_score(truth, values))
        expected = sk.average_precision_score(truth, values)
        assert metrics.average_precision(counts)[i] == pytest.approx(expected)


def test_intervals_cover_the_truth():
    """Normal scores one apart have AUROC 0.7602; 95 % intervals hold it about 95 times of 100."""
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        found = metrics.separation(rng.normal(1, 1, 60), rng.normal(0, 1, 80), 300, seed)
        covered += found.auroc.low <= 0.7602 <= found.auroc.high
        assert found.auroc.low <= found.auroc.value <= found.auroc.high
    # The percentile interval is a little short: Binomial(100, 0.93) reaches 85 with p = 0.998.
    assert covered >= 85


def test_batches_do_not_change_the_intervals(monkeypatch):
    rng = np.random.default_rng(2)
    positives, negatives = rng.normal(1, 1, 20), rng.normal(0, 1, 30)
    whole = metrics.separation(positives, negatives, 100)
    monkeypatch.setattr(metrics, "BATCH", 500)
    in_parts = metrics.separation(positives, negatives, 100)
    # Another order of draws: the same distribution, not the same numbers.
    assert in_parts.auroc.value == whole.auroc.value
    assert in_parts.auroc.low == pytest.approx(whole.auroc.low, abs=0.05)


def test_separable_and_constant_scores():
    perfect = metrics.separation([2.0, 3.0], [0.0, 1.0], 50)
    assert (perfect.auroc.value, perfect.average_precision.value) == (1, 1)
    assert perfect.fpr_at_recall.value == 0
    # Newcombe's and Wilson's: two of each side cannot promise more.
    assert perfect.auroc.low < 0.7
    assert (perfect.auroc.high, perfect.fpr_at_recall.low) == (1, 0)
    assert perfect.fpr_at_recall.high == pytest.approx(metrics.wilson(0, 2).high)
    backward = metrics.separation(np.linspace(0, 1, 7), np.linspace(2, 3, 9), 50)
    assert backward.auroc.low == 0 < backward.auroc.high < 0.3
    assert backward.fpr_at_recall.low < backward.fpr_at_recall.high == 1
    constant = metrics.separation([1.0, 1.0], [1.0, 1.0, 1.0], 50)
    assert constant.auroc.value == 0.5
    assert constant.average_precision.value == pytest.approx(0.4)
    assert constant.fpr_at_recall.value == 1


@pytest.mark.parametrize("bad", [[], [float("nan")], [float("inf")], [[1.0]]])
def test_refuses_what_is_not_scores(bad):
    with pytest.raises(ValueError, match="positives must be"):
        metrics.count(bad, [0.0])


def test_wilson():
    # Newcombe 1998, table I: 15 of 148 is 0.0624 to 0.1605; 0 of 20 is 0 to 0.1611.
    found = metrics.wilson(15, 148)
    assert (found.low, found.high) == (
        pytest.approx(0.0624, abs=1e-4),
        pytest.approx(0.1605, abs=1e-4),
    )
    assert metrics.wilson(0, 20).low == 0
    assert metrics.wilson(0, 20).high == pytest.approx(0.1611, abs=1e-4)
    with pytest.raises(ValueError, match="got 3 of 2"):
        metrics.wilson(3, 2)


def test_ranks():
    similarities = [[0.1, 0.9, 0.3], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    np.testing.assert_array_equal(metrics.ranks_of(similarities, [2, 0, 2]), [1, 0, 2])


def test_the_former_name_of_an_interval() -> None:
    for room in (evaluate, metrics):
        with pytest.warns(DeprecationWarning, match=r"Estimate is called Interval now"):
            assert room.Estimate is evaluate.Interval  # type: ignore[attr-defined]
