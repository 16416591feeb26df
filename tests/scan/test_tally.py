"""Tallies: counts that can be added in any order, and that nobody can forge a crash with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_helpers import HOSTILE

from latentguard.judge import Categories, ConceptScore, ModelId, PolicyId, Verdict, failed
from latentguard.scan import ModelInfo, ScanRecord
from latentguard.scan.bins import MARGINS, PROBABILITIES, Histogram
from latentguard.scan.concept_tally import MAX_EXAMPLES, Judge
from latentguard.scan.error_kinds import MAX_KINDS, ErrorKinds, kind_of
from latentguard.scan.sampling import SamplePlan
from latentguard.scan.tally import Tally

POLICY = PolicyId("made", "7", "ab" * 32)
MODEL = ModelId("nano-flux2", "cd" * 32)
SCALE = 10.0


def score(name: str, margin: float, threshold: float = 0.5, **keys: Any) -> ConceptScore:
    probability = float(1 / (1 + np.exp(-SCALE * margin)))
    limit = {"kind": "probability", "value": threshold}
    matched = probability >= threshold
    known = {"covered": True, "judged": True, "matched": matched, **keys}
    return ConceptScore(name, "made", "block", margin, probability, limit, name, **known)


def record(
    margins: dict[str, float],
    index: int = 0,
    source: str = "a.pt",
    name: str | None = None,
    model: ModelId | None = MODEL,
    policy: PolicyId = POLICY,
    preview: np.ndarray | None = None,
    space: str = "flux2",
    told: tuple[Categories, ...] = (),
) -> ScanRecord:
    concepts = tuple(score(concept, margin) for concept, margin in margins.items())
    decision = "block" if any(concept.matched for concept in concepts) else "allow"
    verdict = Verdict(1, decision, decision, None, 0.0, concepts, taxonomies=told)
    return ScanRecord(source, index, name, space, verdict, policy, model, (4, 4), preview)


def broken(error: str, index: int = 0, source: str = "a.pt") -> ScanRecord:
    return ScanRecord(source, index, None, None, failed(error), POLICY)


def tally_of(*records: ScanRecord, examples: int = 4) -> Tally:
    tally = Tally(examples=examples)
    for one in records:
        tally.add(one)
    return tally


MARGIN = st.floats(-2, 2) | st.sampled_from([0.0, 0.5, -0.5])
PREVIEW = st.none() | st.integers(0, 3).map(lambda n: np.full((2, 2, 3), n, np.uint8))
TOLD = st.builds(
    lambda scheme, version, score, flagged, clause: Categories(
        scheme,
        version,
        {"h": "Hate", "v": "v"},
        ("h",) if flagged else (),
        {"h": score, "v": None},
        {"v": clause},
    ),
    st.sampled_from(["azure", "openai"]),
    st.sampled_from(["1", "2"]),
    st.none() | st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["it cannot be seen", "nobody looked", *HOSTILE[:4], HOSTILE[-1]]),
)
JUDGED = st.builds(
    record,
    st.dictionaries(st.sampled_from(["beer", "gun", "snake"]), MARGIN),
    st.integers(0, 3),
    st.sampled_from(["a.pt", "b.pt"]),
    st.none() | st.sampled_from(HOSTILE[:4]),
    st.sampled_from([MODEL, ModelId("other", "ef" * 32)]),
    preview=PREVIEW,
    told=st.lists(TOLD, max_size=2).map(tuple),
)
BROKEN = st.builds(broken, st.sampled_from(["is empty", "has 3 bytes", "has 17 bytes"]))
RECORDS = st.lists(JUDGED | BROKEN, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_merging_in_any_order_and_grouping_gives_the_same(
    shards: list[list[ScanRecord]], random: Any
) -> None:
    made = [tally_of(*records, examples=2) for records in shards]
    for number, tally in enumerate(made):
        tally.add_seconds(read=0.1 * number, score=0.3)
        tally.bytes_read = number
        tally.add_span(number, number + 1.5)
    expected = Tally.merged(copy.deepcopy(made)).to_dict()
    waiting = copy.deepcopy(made)
    random.shuffle(waiting)
    while len(waiting) > 1:
        one = waiting.pop(random.randrange(len(waiting)))
        waiting[random.randrange(len(waiting))].merge(one)
    assert waiting[0].to_dict() == expected
    again = Tally.merged([Tally.from_dict(json.loads(json.dumps(t.to_dict()))) for t in made])
    assert again.to_dict() == expected


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.randoms(use_true_random=False))
def test_a_shard_read_in_another_order_is_the_same_shard(
    records: list[ScanRecord], random: Any
) -> None:
    expected = tally_of(*records).to_dict()
    random.shuffle(records)
    assert tally_of(*records).to_dict() == expected


def test_what_is_counted() -> None:
    pixels = np.full((64, 48, 3), 90, np.uint8)
    tally = tally_of(
        record({"beer": 0.4, "gun": -0.2}, 0, name="first", preview=pixels),
        record({"beer": -0.4, "gun": -0.1}, 1),
        broken("has 12 bytes, 'a' needs 40", 2),
        broken("has 13 bytes, 'b' needs 40", 1),
    )
    tally.add_seconds(read=1, decode=2.5)
    tally.note_model(ModelInfo(MODEL, "flux2", "Sees objects.", unseen_contrast=("jeans",)))
    assert tally.images == 4
    assert tally.outcomes == {"block": 1, "allow": 1, "error": 2}
    assert tally.decisions == {"block": 3, "allow": 1}
    ((kind, errors),) = tally.errors.by_count()
    assert (kind, errors.count) == ("has # bytes, '…' needs #", 2)
    assert errors.example == ("a.pt", 1, "has 13 bytes, 'b' needs 40")
    assert tally.seconds("decode") == 2.5
    judge = tally.judges[Judge(*MODEL, "flux2")]
    assert (judge.images, judge.notes, judge.unseen_contrast) == (2, "Sees objects.", {"jeans"})
    beer = judge.concepts["beer"]
    assert (beer.judged, beer.matched, beer.threshold_value, beer.unit) == (
        2,
        1,
        0.5,
        "probability",
    )
    assert (beer.highest, beer.lowest) == (0.4, -0.4)
    assert beer.margins.total == beer.probabilities.total == 2
    first, second = beer.gravest
    assert (first.id, first.margin, second.place) == ("first", 0.4, 1)
    assert first.preview is not None
    assert first.preview.startswith(b"\x89PNG")
    assert len(first.preview) < 1000
    assert tally.to_dict()["schema_version"] == 2


def test_models_and_spaces_are_kept_apart() -> None:
    other = ModelId("other", "ef" * 32)
    tally = tally_of(
        record({"beer": 0.1}),
        record({"beer": 0.1}, model=other),
        record({"beer": 0.1}, space="sdxl"),
    )
    assert set(tally.judges) == {
        Judge(*MODEL, "flux2"),
        Judge(*other, "flux2"),
        Judge(*MODEL, "sdxl"),
    }


def test_two_policies_are_not_counted_as_one() -> None:
    other = POLICY._replace(sha256="99" * 32)
    one, two = tally_of(record({"beer": 0.1})), tally_of(record({"beer": 0.1}, policy=other))
    before = one.to_dict()
    with pytest.raises(ValueError, match=r"two policies .* made 7 \(abab.* made 7 \(9999"):
        one.merge(two)
    with pytest.raises(ValueError, match="two policies"):
        one.add(record({}, policy=other))
    assert one.to_dict() == before


def test_two_thresholds_of_one_policy_and_model_are_an_error() -> None:
    one, two = tally_of(record({"beer": 0.1})), tally_of(record({"beer": 0.1}))
    two.judges[Judge(*MODEL, "flux2")].concepts["beer"].threshold["value"] = 0.7
    with pytest.raises(ValueError, match="'beer' was judged by two rules"):
        one.merge(two)


def test_a_sample_and_a_whole_scan_are_not_merged() -> None:
    whole, part = tally_of(record({"beer": 0.1})), tally_of(record({"beer": 0.1}))
    plan = SamplePlan.of(["a", "b", "c"], 2)
    part.sample = plan.start().with_shard("a", 10, {"allow": 1})
    for one, other in ((whole, part), (part, whole)):
        with pytest.raises(ValueError, match="one is of a sample"):
            one.merge(other)
    twice = Tally.from_dict(part.to_dict())
    with pytest.raises(ValueError, match="counted twice: a"):
        part.merge(twice)
    assert Tally.merged([Tally(), part]).sample == part.sample


def test_what_is_kept_is_bounded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    names = [chr(97 + n // 26) + chr(97 + n % 26) for n in range(600)]
    records = [
        record({"beer": n / 1000}, n, "s" * 5000, "i" * 5000, preview=pixels) for n in range(50)
    ]
    shards = [
        tally_of(*records, *(broken(f"{names[n + 60 * s]} is wrong" * 50, n) for n in range(60)))
        for s in range(10)
    ]
    merged = Tally.merged(shards)
    assert len(merged.errors.kinds) == MAX_KINDS
    assert merged.errors.total == 600
    beer = merged.judges[Judge(*MODEL, "flux2")].concepts["beer"]
    assert len(beer.gravest) == MAX_EXAMPLES
    assert len(json.dumps(merged.to_dict())) < 200_000
    assert Tally.from_dict(merged.to_dict()).to_dict() == merged.to_dict()


def test_a_concept_that_is_not_seen_has_no_scores() -> None:
    verdict = record({"beer": 0.1}).verdict
    hidden = score("gun", -1.0, covered=False, matched=False, unseen=("gun", "pistol"))
    made = ScanRecord(
        "a", 0, None, "flux2", Verdict(1, "allow", "", None, 0.0, (*verdict.concepts, hidden)),
        POLICY, MODEL,
    )  # fmt: skip
    concepts = tally_of(made).judges[Judge(*MODEL, "flux2")].concepts
    assert (concepts["gun"].judged, concepts["gun"].unchecked) == (0, 1)
    assert concepts["gun"].unseen == {"gun", "pistol"}
    assert Tally.from_dict(tally_of(made).to_dict()).to_dict() == tally_of(made).to_dict()


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


CONCEPT = ("judges", 0, "concepts", 0)


@pytest.mark.parametrize(
    "change",
    [
        _set("schema_version", to=1),
        _set("schema_version", to=True),
        _set("kind", to="other"),
        _set("more", to=1),
        _set("policy", to=None),
        _set("outcomes", "allow", to=-1),
        _set("outcomes", "allow", to=7),
        _set("outcomes", "other", to=1),
        _set("bytes_read", to=1.5),
        _set("began", to=1),
        _set("errors", "others", to=1),
        _set("images", 0, 0, to="x" * 5000),
        _set("images", 0, 3, to="bm90IGEgcG5n"),
        _set("judges", to=[1]),
        _set("judges", 0, "notes", to="x" * 50_000),
        _set(*CONCEPT, "action", to="explode"),
        _set(*CONCEPT, "judged", to=9),
        _set(*CONCEPT, "matched", to=9),
        _set(*CONCEPT, "highest", to=float("nan")),
        _set(*CONCEPT, "threshold", "kind", to="luck"),
        _set(*CONCEPT, "margins", "first", to=5000),
        _set(*CONCEPT, "margins", "counts", to=[1] * 5000),
        _set(*CONCEPT, "gravest", 0, 2, to=77),
        _set(*CONCEPT, "gravest", to=[[0.1, 0.5, 0]] * 40),
        _set("sample", to={"shards": 1}),
        _set("taxonomies", to=[{"scheme": "azure"}]),
        _set(
            "taxonomies",
            to=[{"scheme": "a", "version": "1", "categories": [["h", "h", -1, 0, ""]]}],
        ),
        _set("taxonomies", to=[{"scheme": "a", "version": "1", "categories": []}] * 2),
    ],
)
def test_what_is_no_tally_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    data = tally_of(record({"beer": 0.1}, preview=pixels), broken("x")).to_dict()
    assert Tally.from_dict(data).to_dict() == data
    change(data)
    with pytest.raises(ValueError, match=r"\w"):
        Tally.from_dict(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_tally_is_read_or_refused(data: st.DataObject) -> None:
    made: Any = tally_of(record({"beer": 0.1}), broken("x")).to_dict()
    spot: Any = made
    while True:
        keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(spot[key], (dict, list)) or not spot[key] or data.draw(st.booleans()):
            break
        spot = spot[key]
    spot[key] = data.draw(JSON)
    try:
        read = Tally.from_dict(made)
    except ValueError:
        return
    json.dumps(read.to_dict(), allow_nan=False)


@given(st.lists(MARGIN, max_size=50), MARGIN)
def test_a_histogram_knows_how_many_are_at_least_a_value(values: list[float], value: float) -> None:
    histogram = Histogram(MARGINS)
    for one in values:
        histogram.add(one)
    low, high = histogram.at_least(value)
    assert low <= sum(one >= value for one in values) <= high
    edge = MARGINS.edges[MARGINS.place(value)]
    low, high = histogram.at_least(edge)
    assert low == high == sum(one >= edge for one in values)


def test_probabilities_of_0_and_1_are_counted() -> None:
    histogram = Histogram(PROBABILITIES)
    for value in (0.0, 1e-12, 0.5, 1 - 1e-12, 1.0):
        histogram.add(value)
    assert histogram.counts[0] == histogram.counts[-1] == 2
    assert histogram.at_least(0.0) == (5, 5)
    assert histogram.at_least(0.5) == (3, 3)
    assert histogram.at_least(1.0) == (0, 2)
    assert histogram.at_least(1.1) == (0, 0)


def test_bins_are_as_fine_as_their_page_says() -> None:
    def width(bins: Any, value: float) -> float:
        return float(np.diff(bins.edges)[bins.place(value)])

    assert (len(MARGINS), len(PROBABILITIES)) == (878, 1024)
    assert width(MARGINS, 0.0) < 0.00051
    assert width(MARGINS, 0.5) < 0.0051
    assert width(PROBABILITIES, 0.5) < 0.008
    assert width(PROBABILITIES, 0.9) < 0.0029
    assert width(PROBABILITIES, 0.99) < 0.00032


@pytest.mark.parametrize("text", HOSTILE)
def test_kinds_of_errors_are_short(text: str) -> None:
    assert len(kind_of(text)) <= 300
    kinds = ErrorKinds()
    kinds.add(text, text, 0)
    assert kinds.total == 1
