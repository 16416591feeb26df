"""Calibration: the guarantee itself, the lock it writes, and the policy that then decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import decided

from latentguard.errors import LatentsError, ModelError
from latentguard.evaluate.calibrate import (
    Margins,
    entries,
    images_needed,
    merge,
    rows,
    threshold,
)
from latentguard.policy import Lock, load_policy, lock_path, write_lock

MODEL = ("test-model", "a" * 64)

POLICY = """
schema_version: 1
name: shop
version: "1"
concepts:
  - id: guns
    category: weapons
    prompts: [a revolver]
    threshold: {fpr: 0.1}
    action: block
  - id: knives
    category: blades
    prompts: [a knife]
    threshold: {fpr: 0.1}
    action: review
    noise_window: [0, 1]
"""


@pytest.fixture
def policy_path(tmp_path):
    path = tmp_path / "shop.yaml"
    path.write_text(POLICY)
    return path


def _margins(n=99, levels=(0.0,), seed=0, concepts=("guns", "knives")):
    rng = np.random.default_rng(seed)
    values = {
        name: {level: rng.normal(-0.3, 0.1, n).astype(np.float32).astype(float) for level in levels}
        for name in concepts
    }
    return Margins(MODEL, "flux2", values, f"{n} images")


# -- the threshold ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.01, 99), (0.001, 999), (0.3, 3)]
)
def test_images_needed(rate, needed):
    assert images_needed(rate) == needed
    values = np.linspace(-1, 1, needed)
    assert values.max() < threshold(values, rate) < values.max() + 1e-6
    with pytest.raises(ValueError, match=f"needs at least {needed:,} images, got {needed - 1:,}"):
        threshold(values[:-1], rate)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1.984375, 1.984375, width=32), min_size=1, max_size=400),
    st.sampled_from([0.01, 0.03, 0.1, 0.25, 0.5, 0.9]),
)
def test_threshold_is_just_above_the_order_statistic(values, rate):
    n = len(values)
    if n < images_needed(rate):
        with pytest.raises(ValueError, match="needs at least"):
            threshold(values, rate)
        return
    found = threshold(values, rate)
    below = sorted(v for v in values if v < found)
    rank = math.ceil(round((n + 1) * (1 - rate), 9))
    # Exactly the values up to that order statistic, and its ties, are not matches.
    assert len(below) >= rank
    assert below[-1] == sorted(values)[rank - 1]
    # Nothing representable lies between: one step lower, the order statistic would match.
    assert float(np.nextafter(np.float32(found), np.float32(-3))) <= below[-1]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(19, 0.05), (30, 0.1), (99, 0.01), (60, 0.25)]),
    st.sampled_from(["normal", "ties", "skewed"]),
)
def test_guarantee_on_random_splits(seed, size, kind):
    """The mean false-positive rate over splits into n and one is at most the rate asked for.

    Exact, not sampled: leaving out each image of n + 1 in turn is the average over all such splits.
    """
    n, rate = size
    rng = np.random.default_rng(seed)
    drawn = rng.normal(-0.3, 0.2, n + 1).clip(-1, 1)
    values = {
        "normal": drawn,
        "ties": np.round(drawn, 1),
        "skewed": -np.exp(-3 * np.abs(drawn)),
    }[kind]
    values = values.astype(np.float32).astype(np.float64)
    matches = [values[i] >= threshold(np.delete(values, i), rate) for i in range(n + 1)]
    assert np.mean(matches) <= rate + 1e-12
    if kind == "normal":
        # And no more cautious than a finite sample has to be.
        assert np.mean(matches) > rate - 1 / (n + 1) - 1e-12


def test_guarantee_on_average_over_fresh_samples():
    rng = np.random.default_rng(0)
    fresh = rng.normal(size=100_000) * 0.1
    rates = [np.mean(fresh >= threshold(rng.normal(size=50) * 0.1, 0.1)) for _ in range(2000)]
    # k = 46 of 50, so the mean is 5 / 51 = 0.098, its standard error here 0.001.
    assert abs(np.mean(rates) - 5 / 51) < 0.004


@pytest.mark.parametrize(
    ("values", "rate", "message"),
    [
        ([0.1] * 20, 0.0, "above 0 and below 1, got 0"),
        ([0.1] * 20, 1.0, "above 0 and below 1, got 1"),
        ([0.1, math.nan], 0.5, "finite"),
        ([[0.1, 0.2]], 0.5, "finite numbers"),
        ([2.0] * 20, 0.5, "no threshold is above a margin of 2"),
    ],
)
def test_thresholds_that_cannot_be_had(values, rate, message):
    with pytest.raises(ValueError, match=message):
        threshold(values, rate)


# -- the lock --------------------------------------------------------------------------------------


def test_lock_loads_and_the_policy_decides(policy_path):
    policy = load_policy(policy_path, use_lock=False)
    margins = _margins(levels=(0.0, 0.5))
    new = entries(policy, margins, [0.1, 0.05])
    write_lock(lock_path(policy_path), merge(None, policy, new))
    locked = load_policy(policy_path)
    assert len(locked.lock.entries) == 4
    limits = [threshold(margins.values[name][0.0], 0.1) for name in ("guns", "knives")]
    just_under = [float(np.nextafter(np.float32(limit), np.float32(-1))) for limit in limits]
    margin = np.array([limits, just_under, [limits[0], just_under[1]]])
    best = np.array([[0, 1]] * 3)
    found = decided(
        np.full((3, 2), 0.5), margin, best, locked.to_dict(), model=MODEL, space="flux2"
    )
    assert [v.error for v in found] == [None] * 3
    assert [[c.matched for c in v.concepts] for v in found] == [
        [True, True], [False, False], [True, False],
    ]  # fmt: skip
    assert [v.decision for v in found] == ["block", "allow", "block"]


def test_merging_keeps_other_models_and_replaces_its_own(policy_path):
    policy = load_policy(policy_path, use_lock=False)
    old = entries(policy, _margins(levels=(0.0, 2.0)), [0.1])
    other = [e.model_copy(update={"model": "another"}) for e in old]
    stale = other[0].model_copy(update={"prompts_sha256": "b" * 64, "model": "third"})
    gone = other[0].model_copy(update={"concept": "swords", "model": "third"})
    lock = Lock(schema_version=1, entries=(*old, *other, stale, gone))
    new = entries(policy, _margins(seed=1, concepts=("guns",)), [0.1])
    found = merge(lock, policy, new)
    kept = {(e.model, e.concept, e.noise_level) for e in found.entries}
    assert kept == {
        ("test-model", "guns", 0.0),  # both levels of the old calibration have gone
        ("test-model", "knives", 0.0), ("test-model", "knives", 2.0),
        ("another", "guns", 0.0), ("another", "guns", 2.0),
        ("another", "knives", 0.0), ("another", "knives", 2.0),
    }  # fmt: skip
    assert new[0] in found.entries


def test_rows_are_what_the_entries_hold(policy_path):
    policy = load_policy(policy_path, use_lock=False)
    margins = _margins(levels=(0.0, 1.0))
    table = rows(entries(policy, margins, [0.2, 0.1]), margins)
    assert len(table) == 8
    assert table[0].fpr == 0.1
    assert table[0].images == 99
    assert table[0].margin == threshold(margins.values["guns"][0.0], 0.1)


def test_rates_too_small_are_refused_with_the_number_needed(policy_path):
    policy = load_policy(policy_path, use_lock=False)
    with pytest.raises(ModelError, match=r"'guns' at noise level 0: .* 999 images, got 99"):
        entries(policy, _margins(), [0.001])
    with pytest.raises(ModelError, match="no concept 'swords': it has guns, knives"):
        entries(policy, _margins(concepts=("swords",)), [0.1])
    with pytest.raises(ModelError, match="at least one"):
        entries(policy, _margins(), [])


def test_unknown_estimate_and_levels(policy_path):
    pytest.importorskip("torch", reason="scoring needs torch")
    from latentguard.evaluate.calibrate import measure

    with pytest.raises(ModelError, match="must be one of none, wiener, got 'best'"):
        measure(["x.pt"], policy_path, estimate="best")
    with pytest.raises(ModelError, match="noise levels must be 0 to 1e6, and at least one, got -1"):
        measure(["x.pt"], policy_path, noise_levels=[-1])
    with pytest.raises(LatentsError, match=r"x\.pt"):
        measure(["x.pt"], policy_path, noise_levels=[0, 1])
