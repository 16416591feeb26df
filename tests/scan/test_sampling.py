"""Samples: which images are drawn, and whether the intervals hold what they promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_helpers import ALWAYS, NEVER, write_latents

from latentguard.scan import Scan
from latentguard.scan.estimates import percentage, sentences, shares, student
from latentguard.scan.sampling import Cluster, ClusterSample, Reservoir, SamplePlan


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 99))
def test_a_reservoir_holds_as_many_as_it_can(rows: int, size: int, seed: int) -> None:
    reservoir = Reservoir(rows, seed, "shard")
    held: set[int] = set()
    for place in range(size):
        wanted, left = reservoir.offer()
        held |= {place} if wanted else set()
        held -= {left}
    assert reservoir.seen == size
    assert reservoir.places == sorted(held)
    assert len(held) == min(rows, size)


def test_each_image_of_a_shard_has_the_same_chance() -> None:
    drawn = np.zeros(20)
    for seed in range(2000):
        reservoir = Reservoir(5, seed, "shard")
        for _ in range(20):
            reservoir.offer()
        drawn[reservoir.places] += 1
    # 500 each, with a deviation of 19.4.
    assert np.abs(drawn - 500).max() < 80


def test_a_plan_depends_on_names_and_seed_alone() -> None:
    names = [f"{n:05d}.tar" for n in range(300)]
    plan = SamplePlan.of(names, 1000, seed=3)
    assert plan == SamplePlan.of([*reversed(names), names[0]], 1000, seed=3)
    assert plan.shards != SamplePlan.of(names, 1000, seed=4).shards
    assert (plan.spread, plan.rows) == (200, 5)
    assert sorted(plan.shards) == names
    assert (SamplePlan.of(names, 50).spread, SamplePlan.of(names, 50).rows) == (50, 1)
    assert (SamplePlan.of(["a"], 50).spread, SamplePlan.of(["a"], 50).rows) == (1, 50)
    with pytest.raises(ValueError, match="a sample needs images"):
        SamplePlan.of(names, 0)


def made(*shards: tuple[int, dict[str, int]], of: int) -> ClusterSample:
    clusters = {str(n): Cluster(size, Counter(seen)) for n, (size, seen) in enumerate(shards)}
    return ClusterSample(of, 10, 0, clusters)


def share_of(sample: ClusterSample, outcome: str) -> Any:
    return next(share for share in shares(sample) if share.outcome == outcome)


def test_images_are_weighted_by_the_size_of_their_shard() -> None:
    sample = made((900, {"block": 10}), (100, {"allow": 10}), of=50)
    blocked = share_of(sample, "block")
    assert blocked.share == pytest.approx(0.9)
    assert blocked.low < 0.9 < blocked.high
    assert blocked.seen == 10


def test_where_every_image_was_looked_at_nothing_is_left_to_guess() -> None:
    sample = made((3, {"block": 1, "allow": 2}), (2, {"allow": 2}), of=2)
    blocked = share_of(sample, "block")
    assert (blocked.low, blocked.share, blocked.high) == (0.2, 0.2, 0.2)
    assert share_of(sample, "error").high == 0
    assert "all images were looked at" in "".join(sentences(sample))


def test_one_shard_says_nothing_of_others_and_enough_of_itself() -> None:
    seen = {"block": 20, "allow": 80}
    one_of_many = share_of(made((1000, seen), of=9), "block")
    assert (one_of_many.low, one_of_many.share, one_of_many.high) == (0.0, 0.2, 1.0)
    only = share_of(made((1000, seen), of=1), "block")
    assert 0.12 < only.low < 0.2 < only.high < 0.30


def test_what_was_not_seen_has_an_upper_bound() -> None:
    sample = made(*[(1000, {"allow": 10})] * 50, of=500)
    blocked = share_of(sample, "block")
    assert (blocked.share, blocked.low, blocked.seen) == (0.0, 0.0, 0)
    assert blocked.high == pytest.approx(1 - 0.05 ** (1 / 50))
    assert blocked.independent == pytest.approx(1 - 0.05 ** (1 / 500))
    allowed = share_of(sample, "allow")
    assert (allowed.share, allowed.high) == (1.0, 1.0)
    assert allowed.low == pytest.approx(1 - blocked.high)
    assert {share.outcome for share in shares(sample)} == {"allow", "review", "block", "error"}
    text = "\n".join(sentences(sample))
    assert "block: 0 % (at most 5.82 %; 0.60 % if it does not depend on the shard)" in text


def test_the_bound_of_a_whole_set_hides_images_where_fewest_were_looked_at() -> None:
    even = share_of(made((1000, {"allow": 100}), (1000, {"allow": 100}), of=2), "block")
    assert even.high == pytest.approx(1 - 0.05 ** (1 / 200), rel=1e-3)
    uneven = share_of(made((1000, {"allow": 10}), (1000, {"allow": 190}), of=2), "block")
    assert uneven.high > 5 * even.high
    read_whole = share_of(made((10, {"allow": 10}), (1000, {"allow": 190}), of=2), "block")
    assert read_whole.high == pytest.approx((1 - 0.05 ** (1 / 190)) * 1000 / 1010, rel=1e-3)


def test_an_empty_sample_says_nothing() -> None:
    assert shares(ClusterSample(5, 10, 0)) == []
    assert sentences(ClusterSample(5, 10, 0)) == []
    assert share_of(made((0, {}), (4, {"allow": 4}), of=2), "allow").share == 1.0


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 50)), min_size=1, max_size=8
    ),
    st.integers(0, 5),
)
def test_an_interval_holds_its_estimate(shards: list[tuple[int, int, int]], more: int) -> None:
    sample = made(
        *(
            (block + allow + rest, {"block": block, "allow": allow})
            for block, allow, rest in shards
        ),
        of=len(shards) + more,
    )
    for share in shares(sample):
        assert 0 <= share.low <= share.share + 1e-12
        assert share.share <= share.high + 1e-12
        assert share.high <= 1
        assert share.interval


def test_quantiles_of_student() -> None:
    # Tables of the t distribution, two-sided 95 %.
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 1000: 1.9623}
    for freedom, value in known.items():
        assert student(freedom) == pytest.approx(value, abs=5e-5)
    assert student(10**9) == pytest.approx(1.95996, abs=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        student(0)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.12345, "12.35 %"), (0.0012, "0.12 %"), (3e-6, "0.0003 %")],
)
def test_percentages(share: float, text: str) -> None:
    assert percentage(share) == text


def population(random: np.random.Generator, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of shards from 300 to 4,000, and blocked images: strongly clustered, a third each of
    shards with hardly any, with some, and with most."""
    size = np.exp(random.normal(6.9, 0.5, shards)).astype(int) + 1
    share = random.choice([0.005, 0.1, 0.7], shards, p=[0.5, 0.35, 0.15])
    return size, random.binomial(size, share)


def drawn(
    random: np.random.Generator, size: np.ndarray, blocked: np.ndarray, shards: int, rows: int
) -> ClusterSample:
    clusters = {}
    for place in random.choice(len(size), shards, replace=False):
        looked = min(int(size[place]), rows)
        hits = int(random.hypergeometric(blocked[place], size[place] - blocked[place], looked))
        counts = Counter({"block": hits, "allow": looked - hits})
        clusters[str(place)] = Cluster(int(size[place]), counts)
    return ClusterSample(len(size), rows, 0, clusters)


@pytest.mark.parametrize(
    ("shards", "rows", "least"),
    # Few shards of which a seventh holds most fall short, as docs/scan.md says.
    [(30, 50, 0.90), (100, 20, 0.92), (8, 100, 0.78)],
)
def test_the_interval_covers_the_truth_about_as_often_as_it_says(
    shards: int, rows: int, least: float
) -> None:
    random = np.random.default_rng(5)
    held = naive = 0
    for number in range(400):
        if number % 10 == 0:
            size, blocked = population(random, 400)
        truth = blocked.sum() / size.sum()
        share = share_of(drawn(random, size, blocked, shards, rows), "block")
        held += share.low <= truth <= share.high
        alone = 1.96 * np.sqrt(share.share * (1 - share.share) / (shards * rows))
        naive += abs(share.share - truth) <= alone
    assert least <= held / 400 <= 0.99
    assert naive / 400 < 0.5  # one that takes images for independent


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [write_latents(tmp_path / f"{n}.pt", 2 + 3 * (n % 3), seed=n, side=8) for n in range(8)]


def test_a_scan_looks_at_a_sample(shards: list[Path], policy: Any) -> None:
    rules = policy(("revolver", "block", NEVER), ("wine bottle", "review", ALWAYS))
    whole = {(r.source, r.index): r for r in Scan(shards, rules)}

    def run(**options: Any) -> tuple[list[Any], ClusterSample]:
        scan = Scan(shards, rules, batch_size=4, sample_shards=4, **options)
        records = list(scan)
        assert scan.drawn is not None
        return records, scan.drawn

    records, sample = run(sample=12, seed=1)
    assert sample.images == len(records) >= 12
    assert len(sample.clusters) >= 4
    assert sample.shards == 8
    assert all(cluster.looked_at <= 3 for cluster in sample.clusters.values())
    assert all(cluster.size in (2, 5, 8) for cluster in sample.clusters.values())
    places = [(r.source, r.index) for r in records]
    assert len(set(places)) == len(places)
    for record in records:
        assert record.verdict.decision == whole[record.source, record.index].verdict.decision
    again, same = run(sample=12, seed=1)
    assert [(r.source, r.index) for r in again] == places
    assert same == sample
    assert [(r.source, r.index) for r in run(sample=12, seed=2)[0]] != places
    everything, census = run(sample=1000)
    assert len(everything) == len(whole)
    assert share_of(census, "review").interval == "all images were looked at"


def test_a_shard_that_cannot_be_read_is_an_image_that_cannot(
    shards: list[Path], policy: Any
) -> None:
    shards[2].write_bytes(b"no latents")
    scan = Scan(shards, policy(("revolver", "block", NEVER)), sample=40)
    failed = [record for record in scan if record.failed]
    assert [record.source for record in failed] == [str(shards[2])]
    assert scan.drawn is not None
    assert scan.drawn.clusters[str(shards[2])] == Cluster(1, Counter(error=1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 5))
def test_a_sampler_keeps_what_its_reservoirs_hold(
    sizes: list[int], images: int, batch: int
) -> None:
    from latentguard.files import ArrayRecord
    from latentguard.scan.sampled import Sampler

    names = [str(n) for n in range(len(sizes))]

    def read(name: str) -> Iterator[ArrayRecord]:
        for index in range(sizes[int(name)]):
            yield ArrayRecord(name, index, None, None, "x")

    sampler = Sampler(SamplePlan.of(names, images, seed=batch, spread=2), read)

    def judged() -> Iterator[Any]:
        waiting: list[Any] = []
        for row in sampler.rows():
            waiting.append(
                type("Record", (), {"at": (row.source, row.index), "outcome": "allow"})()
            )
            if len(waiting) > batch:
                yield from waiting
                waiting = []
        yield from waiting

    kept = [record.at for record in sampler.keep(judged())]
    sample = sampler.sample
    expected = []
    for name in sampler.plan.shards[: len(sample.clusters)]:
        reservoir = sampler.plan.reservoir(name)
        for _ in range(sizes[int(name)]):
            reservoir.offer()
        expected += [(name, place) for place in reservoir.places]
        assert sample.clusters[name].size == sizes[int(name)]
    assert kept == expected
    assert sample.images == len(kept)
    assert sample.images >= images or len(sample.clusters) == len(sizes)
