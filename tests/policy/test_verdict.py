"""Scores and a policy to verdicts."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from judging import decided, limit_of

from latentguard.judge import (
    DECISIONS,
    PURE_NOISE,
    SCHEMA_VERSION,
    ModelId,
    Rules,
    Verdict,
    failed,
)
from latentguard.policy import CalibratedMargin, Lock, LockEntry, load_policy, parse_policy

POLICY = """\
schema_version: 1
name: test
version: "1"
concepts:
  - id: guns
    category: weapons
    prompts: [revolver, rifle]
    threshold: {probability: 0.5}
    action: block
    severity: high
  - id: knives
    category: weapons
    prompts: [knife]
    threshold: {margin: 0.02}
    action: steer
    steer: {strength: 2}
  - id: beer
    category: alcohol
    prompts: [a glass of beer, beer bottle]
    threshold: {probability: 0.6}
    action: review
    noise_window: [0, 1]
  - id: dogs
    category: animals
    prompts: [dog]
    threshold: {probability: 0.5}
    action: observe
"""
PLAIN = parse_policy(POLICY).to_dict()
PROMPTS = ("revolver", "rifle", "knife", "a glass of beer", "beer bottle", "dog")
BEST = (1, 2, 4, 5)
QUIET = ((0.1, 0.2, 0.3, 0.4), (-0.2, -0.1, -0.1, -0.1))


def judge(
    probability: tuple[float, ...] = QUIET[0],
    margin: tuple[float, ...] = QUIET[1],
    best: tuple[int, ...] = BEST,
    policy: dict[str, Any] = PLAIN,
    **more: Any,
) -> Verdict:
    (verdict,) = decided([probability], [margin], [best], policy, **more)
    return verdict


def with_scores(**scores: tuple[float, float]) -> Verdict:
    return judge(*scores_of(**scores))


def scores_of(**scores: tuple[float, float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    ids = [concept["id"] for concept in PLAIN["concepts"]]
    probability, margin = list(QUIET[0]), list(QUIET[1])
    for name, (p, m) in scores.items():
        probability[ids.index(name)], margin[ids.index(name)] = p, m
    return tuple(probability), tuple(margin)


def test_allow_names_the_closest_concept() -> None:
    verdict = judge()
    assert verdict.decision == "allow"
    assert verdict.reason == (
        "allow: closest is concept 'dogs' by 'dog' with probability 0.400, "
        "0.100 under its threshold of 0.500"
    )
    assert verdict.error is None
    assert verdict.matched == ()
    assert [score.id for score in verdict.concepts] == ["guns", "knives", "beer", "dogs"]


def test_block_names_concept_prompt_score_and_threshold() -> None:
    verdict = with_scores(guns=(0.93, 0.2))
    assert verdict.decision == "block"
    assert verdict.reason == (
        "block: concept 'guns' matched 'rifle' with probability 0.930, threshold 0.500"
    )
    (score,) = verdict.matched
    assert (score.id, score.category, score.action) == ("guns", "weapons", "block")
    assert score.threshold == {"kind": "probability", "value": 0.5}
    assert score.prompt == "rifle"


def test_the_threshold_itself_is_a_match() -> None:
    assert with_scores(guns=(0.5, 0.0)).decision == "block"
    assert with_scores(guns=(math.nextafter(0.5, 0), 0.0)).decision == "allow"
    assert with_scores(knives=(0.6, 0.02)).decision == "block"
    assert with_scores(knives=(0.6, 0.0199)).decision == "allow"


def test_a_margin_threshold_looks_at_the_margin_alone() -> None:
    assert with_scores(knives=(0.01, 0.03)).decision == "block"
    verdict = with_scores(knives=(0.99, 0.015))
    assert verdict.decision == "allow"
    assert "'knives' by 'knife' with margin 0.015, 0.005 under" in verdict.reason


def test_steer_blocks_where_nothing_can_be_steered_any_more() -> None:
    scores = scores_of(knives=(0.9, 0.1))
    assert judge(*scores, final=False, noise_level=0.5).decision == "steer"
    final = judge(*scores)
    assert final.decision == "block"
    assert final.reason.endswith("threshold 0.020, and it is too late to steer")


def test_the_strictest_action_decides_and_the_others_are_named() -> None:
    scores = scores_of(guns=(0.7, 0.1), beer=(0.9, 0.3), dogs=(0.9, 0.3), knives=(0.9, 0.1))
    verdict = judge(*scores, final=False)
    assert verdict.decision == "block"
    assert verdict.reason == (
        "block: concept 'guns' matched 'rifle' with probability 0.700, threshold 0.500; "
        "also matched: 'knives', 'beer'"
    )
    assert [score.id for score in verdict.matched] == ["guns", "knives", "beer", "dogs"]


def test_observe_is_recorded_and_never_more() -> None:
    verdict = with_scores(dogs=(0.99, 0.5))
    assert verdict.decision == "allow"
    assert [score.id for score in verdict.matched] == ["dogs"]
    assert "observed only: concept 'dogs' matched 'dog' with probability 0.990" in verdict.reason


def test_a_concept_is_judged_in_its_noise_window_only() -> None:
    scores = scores_of(beer=(0.9, 0.3))
    assert judge(*scores, final=False, noise_level=1.0).decision == "review"
    outside = judge(*scores, final=False, noise_level=1.1)
    assert outside.decision == "allow"
    assert [score.judged for score in outside.concepts] == [True, True, False, True]
    assert outside.noise_level == 1.1
    # whatever the window, final latents are judged
    assert judge(*scores, final=True, noise_level=1.1).decision == "review"


def test_no_concept_at_this_noise_level() -> None:
    policy = parse_policy(POLICY.replace("action:", "noise_window: [0, 1]\n    action:", 1))
    plain = policy.model_copy(update={"concepts": policy.concepts[:1]}).to_dict()
    (verdict,) = decided([[0.99]], [[0.5]], [[0]], plain, noise_level=9, final=False)
    assert (verdict.decision, verdict.reason) == (
        "allow",
        "allow: no concept is judged at noise level 9",
    )


def test_pure_noise_has_an_infinite_level() -> None:
    verdict = judge(final=False, noise_level=math.inf)
    assert verdict.error is None
    assert verdict.noise_level == math.inf
    assert verdict.to_dict()["noise_level"] is None
    assert Verdict.from_dict(verdict.to_dict()) == verdict


def test_uncovered_concepts_never_match_and_are_marked() -> None:
    scores = scores_of(guns=(0.99, 0.5))
    policy = {**PLAIN, "uncovered": "warn"}
    verdict = judge(*scores, policy=policy, covered=[False, True, True, False])
    assert verdict.decision == "allow"
    assert verdict.reason.endswith("2 concepts are not visible to this model")
    assert [score.covered for score in verdict.concepts] == [False, True, True, False]
    assert not verdict.concepts[0].matched


def test_uncovered_concepts_are_an_error_where_the_policy_says_so() -> None:
    with pytest.raises(
        ValueError, match="the model does not see 'knives', and the policy says uncovered: error"
    ):
        judge(covered=[True, False, True, True])


SEES = [True, False, True, False, False, True]
"""Of PROMPTS: not the rifle, and nothing of beer."""


def test_prompts_that_are_not_seen_are_named_in_the_verdict_and_its_reason() -> None:
    verdict = judge(policy={**PLAIN, "uncovered": "warn"}, seen=SEES)
    assert verdict.decision == "allow"
    assert [score.covered for score in verdict.concepts] == [True, True, False, True]
    assert [score.unseen for score in verdict.concepts] == [
        ("rifle",),
        (),
        ("a glass of beer", "beer bottle"),
        (),
    ]
    assert verdict.reason.endswith(
        "1 concept is not visible to this model; prompts not checked of 'guns': 'rifle'"
    )
    data = json.loads(json.dumps(verdict.to_dict()))
    assert data["concepts"][0]["unseen"] == ["rifle"]
    assert Verdict.from_dict(data) == verdict


def test_one_prompt_that_is_not_seen_is_an_error_where_the_policy_says_so() -> None:
    with pytest.raises(
        ValueError, match="does not see 'beer', 'rifle' of 'guns', and the policy says uncovered"
    ):
        judge(seen=SEES)


def test_the_stricter_of_two_records_of_coverage_counts() -> None:
    policy = {**PLAIN, "uncovered": "warn"}
    verdict = judge(policy=policy, covered=[True, False, True, True], seen=SEES)
    assert [score.covered for score in verdict.concepts] == [True, False, False, True]
    assert verdict.concepts[1].unseen == ("knife",)


@pytest.mark.parametrize("seen", [[], [True] * 5, [True] * 7])
def test_coverage_of_other_prompts_judges_nothing(seen: list[bool]) -> None:
    with pytest.raises(ValueError, match="one value for each of 6 prompts"):
        judge(seen=seen)


def test_records_from_before_prompts_were_named_still_read() -> None:
    data = judge().to_dict()
    for concept in data["concepts"]:
        del concept["unseen"]
    assert Verdict.from_dict(data) == judge()


@pytest.mark.parametrize("unseen", ["rifle", [1], None, {"rifle": 1}])
def test_records_with_unreadable_prompts_are_refused(unseen: object) -> None:
    data = judge().to_dict()
    data["concepts"][0]["unseen"] = unseen
    with pytest.raises(ValueError, match="unseen must be a list of prompts"):
        Verdict.from_dict(data)


def test_a_model_that_sees_nothing_allows_nothing() -> None:
    with pytest.raises(ValueError, match="the model sees none of the policy's concepts"):
        judge(policy={**PLAIN, "uncovered": "warn"}, covered=[False] * 4)
    with pytest.raises(ValueError, match="one value for each of 4 concepts, got 3"):
        judge(covered=[True] * 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_scores_that_are_not_finite_fail_closed(bad: float, where: int) -> None:
    scores = [list(QUIET[0]), list(QUIET[1])]
    scores[where][3] = bad
    verdict = judge(tuple(scores[0]), tuple(scores[1]))
    assert verdict.decision == "block"
    assert verdict.error is not None
    assert "the score of concept 'dogs' is not finite" in verdict.error
    assert verdict.reason.startswith("block: this could not be judged, the score of concept 'dogs'")
    assert [score.id for score in verdict.concepts] == ["guns", "knives", "beer"]
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_one_bad_image_leaves_the_others_alone() -> None:
    probability = np.array([QUIET[0], (np.nan,) * 4, QUIET[0]], np.float32)
    margin = np.array([QUIET[1]] * 3, np.float32)
    verdicts = decided(probability, margin, [BEST] * 3, PLAIN)
    assert [verdict.decision for verdict in verdicts] == ["allow", "block", "allow"]


@pytest.mark.parametrize(("on_error", "decision"), [("review", "review"), ("allow", "allow")])
def test_on_error_says_what_an_error_leads_to(on_error: str, decision: str) -> None:
    policy = {**PLAIN, "on_error": on_error}
    verdict = judge((math.nan, 0.1, 0.1, 0.1), policy=policy)
    assert verdict.decision == decision
    assert verdict.error is not None
    assert verdict.reason.startswith(f"{decision}: this could not be judged")


def test_what_could_be_read_may_be_stricter_than_on_error() -> None:
    policy = {**PLAIN, "on_error": "review"}
    verdict = judge((0.9, 0.1, math.nan, 0.1), policy=policy)
    assert verdict.decision == "block"
    assert verdict.reason.startswith("block: concept 'guns' matched 'rifle'")
    assert verdict.error is not None


@pytest.mark.parametrize(
    ("probability", "margin", "best", "expected"),
    [
        ((1.01, 0, 0, 0), QUIET[1], BEST, "'guns' is impossible"),
        ((-0.01, 0, 0, 0), QUIET[1], BEST, "'guns' is impossible"),
        (QUIET[0], (2.1, 0, 0, 0), BEST, "'guns' is impossible"),
        (QUIET[0], QUIET[1], (2, 2, 3, 5), "'guns' has index 2, which is not one of its"),
        (QUIET[0], QUIET[1], (-1, 2, 3, 5), "'guns' has index -1"),
        (QUIET[0], QUIET[1], (0, 2, 3, 99), "'dogs' has index 99"),
        (QUIET[0][:3], QUIET[1], BEST, r"probability must be \[images, 4 concepts\]"),
        (QUIET[0], QUIET[1][:3], BEST, r"margin must be .* got \[1, 3\]"),
        (QUIET[0], QUIET[1], BEST[:3], "best_prompt must be"),
        (("a", "b", "c", "d"), QUIET[1], BEST, "probability must hold real numbers"),
        (QUIET[0], (1j, 0, 0, 0), BEST, "margin must hold real numbers, got complex128"),
        (QUIET[0], QUIET[1], (0.0, 2.0, 3.0, 5.0), "best_prompt must hold integers, got float64"),
    ],
)
def test_scores_that_cannot_be_right_fail_closed(
    probability: Any, margin: Any, best: Any, expected: str
) -> None:
    verdict = judge(probability, margin, best)
    assert verdict.decision == "block"
    assert verdict.error is not None
    assert re.search(expected, verdict.error), verdict.error


def test_shapes_that_disagree_give_a_verdict_for_each_image() -> None:
    verdicts = decided(np.zeros((3, 4)), np.zeros((2, 4)), np.zeros((3, 4), int), PLAIN)
    assert [verdict.decision for verdict in verdicts] == ["block"] * 3
    for shape in ((4,), (), (1, 2, 4)):
        verdicts = decided(np.zeros(shape), np.zeros(shape), np.zeros(shape, int), PLAIN)
        assert verdicts
        assert {verdict.decision for verdict in verdicts} == {"block"}


def test_an_empty_batch_has_no_verdicts() -> None:
    empty = np.zeros((0, 4))
    assert decided(empty, empty, empty.astype(int), PLAIN) == []


@pytest.mark.parametrize("level", [math.nan, -0.1, "loud", None])
def test_noise_levels_that_cannot_be_read_fail_closed(level: Any) -> None:
    verdict = judge(noise_level=level, final=False)
    assert verdict.decision == "block"
    assert verdict.error is not None
    json.dumps(verdict.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {**PLAIN, "schema_version": 2},
        {**PLAIN, "schema_version": "1"},
        {**PLAIN, "concepts": []},
        {**PLAIN, "concepts": None},
        {**PLAIN, "on_error": "ignore", "schema_version": 0},
        {
            **PLAIN,
            "concepts": [
                {**c, "threshold": {"kind": "odd", "value": 1}} for c in PLAIN["concepts"]
            ],
        },
        {**PLAIN, "concepts": [{**c, "action": "shrug"} for c in PLAIN["concepts"]]},
        None,
    ],
)
def test_policies_that_cannot_be_read_judge_nothing(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"^(policy|concept)\b"):
        Rules.of(policy)


def test_failed() -> None:
    verdict = failed("the file is\ntruncated", Rules.of(PLAIN), 0.5)
    assert verdict == Verdict(
        schema_version=SCHEMA_VERSION,
        decision="block",
        reason="block: this could not be judged, the file is truncated",
        error="the file is truncated",
        noise_level=0.5,
        concepts=(),
    )
    assert failed("x", Rules.of({**PLAIN, "on_error": "review"})).decision == "review"
    assert failed("x", Rules.of({**PLAIN, "on_error": "shrug"})).decision == "block"
    assert failed("x").decision == "block"
    assert failed("").error


def test_at_least() -> None:
    assert [judge().at_least(d) for d in DECISIONS] == [True, False, False, False]
    blocked = with_scores(guns=(0.9, 0.2))
    assert all(blocked.at_least(decision) for decision in DECISIONS)


def test_dictionaries_round_trip_through_json() -> None:
    verdict = with_scores(guns=(0.9, 0.2), dogs=(0.7, 0.1))
    data = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert Verdict.from_dict(data) == verdict
    assert set(data) == {
        "schema_version",
        "decision",
        "reason",
        "error",
        "noise_level",
        "concepts",
        "model",
    }
    # a scan's records hold more
    assert Verdict.from_dict({**data, "source": "x.pt", "index": 3}) == verdict


def test_float32_scores_become_plain_numbers() -> None:
    verdicts = decided(
        np.array([QUIET[0]], np.float16),
        np.array([QUIET[1]], np.float32),
        np.array([BEST], np.int32),
        PLAIN,
    )
    score = verdicts[0].concepts[0]
    assert [type(v) for v in (score.margin, score.probability)] == [float, float]
    assert [type(v) for v in (score.id, score.prompt, score.matched)] == [str, str, bool]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema_version": 2}, "schema_version must be 1, got 2"),
        ({"schema_version": True}, "schema_version must be 1, got True"),
        ({"decision": "maybe"}, "decision must be one of allow, review, steer, block"),
        ({"reason": None}, "reason must be of type str, got None"),
        ({"noise_level": "0"}, "noise_level must be of type float"),
        ({"noise_level": math.nan}, "noise_level must be of type float"),
        ({"concepts": [1]}, "concepts must hold mappings, got 1"),
        ({"concepts": [{}]}, "threshold is missing"),
    ],
)
def test_from_dict_refuses(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Verdict.from_dict({**judge().to_dict(), **change})


def locked(margins: dict[float, float], rate: float = 0.01) -> dict[str, Any]:
    """The policy with guns at a false-positive rate, calibrated at noise levels -> margins."""
    policy = parse_policy(POLICY.replace("{probability: 0.5}", f"{{fpr: {rate}}}", 1))
    entries = tuple(
        LockEntry(
            model="nano",
            model_sha256="ab" * 32,
            space="flux2",
            noise_level=level,
            concept="guns",
            prompts_sha256=policy.prompts_sha256(policy.concepts[0]),
            margins=(CalibratedMargin(fpr=0.01, margin=margin),),
        )
        for level, margin in margins.items()
    )
    plain = policy.to_dict()
    plain["lock"] = Lock(schema_version=1, entries=entries).model_dump(mode="json")
    return plain


MODEL = ("nano", "ab" * 32)


def test_a_rate_is_looked_up() -> None:
    plain = locked({0.0: 0.15})
    scores = scores_of(guns=(0.9, 0.15))
    verdict = judge(*scores, policy=plain, model=MODEL, space="flux2")
    assert verdict.decision == "block"
    assert verdict.concepts[0].threshold == {"kind": "fpr", "value": 0.01, "margin": 0.15}
    assert verdict.reason == (
        "block: concept 'guns' matched 'rifle' with margin 0.150, threshold 0.150 for a "
        "false-positive rate of 0.01"
    )
    scores = scores_of(guns=(0.9, 0.14))
    assert judge(*scores, policy=plain, model=MODEL, space="flux2").decision == "allow"


def test_between_two_noise_levels_the_lower_margin_counts() -> None:
    plain = locked({0.0: 0.1, 0.5: 0.3, 1.0: 0.2})

    def margin(level: float) -> float:
        return limit_of(plain["concepts"][0], plain, MODEL, "flux2", level)

    assert margin(0.0) == 0.1
    assert margin(0.5) == 0.3
    assert margin(np.float32(0.5) + 1e-6) == 0.3
    assert margin(0.2) == 0.1
    assert margin(0.7) == 0.2
    assert margin(1.0) == 0.2
    for level in (1.1, math.inf):
        with pytest.raises(ValueError, match="calibrated for noise levels 0 to 1, not for"):
            margin(level)
    bad = locked({0.3: 0.1})
    with pytest.raises(ValueError, match=r"calibrated for noise levels 0\.3 to 0\.3, not for 0"):
        limit_of(bad["concepts"][0], bad, MODEL, "flux2", 0.0)


def test_a_verdict_names_the_model_that_scored_it() -> None:
    plain = locked({0.0: 0.15})
    verdict = judge(*scores_of(guns=(0.9, 0.15)), policy=plain, model=MODEL, space="flux2")
    assert verdict.model == MODEL
    data = json.loads(json.dumps(verdict.to_dict()))
    assert data["model"] == {"name": "nano", "sha256": "ab" * 32}
    assert Verdict.from_dict(data) == verdict
    line = {**data, "model": "nano", "model_sha256": "ab" * 32}  # as in audit logs
    assert Verdict.from_dict(line) == verdict
    del data["model"]
    assert Verdict.from_dict(data).model is None
    for bad in ({"model": {"name": "nano"}}, {"model": "nano"}, {"model": 3}):
        with pytest.raises(ValueError, match=r"^verdict: (sha256|model)"):
            Verdict.from_dict({**data, **bad})


def test_pure_noise_is_calibrated_as_one_level() -> None:
    plain = locked({0.0: 0.1, 3.0: 0.2, PURE_NOISE: 0.15})
    for level, margin in ((math.inf, 0.15), (2e6, 0.15), (PURE_NOISE, 0.15), (5.0, 0.15)):
        assert limit_of(plain["concepts"][0], plain, MODEL, "flux2", level) == margin


@pytest.mark.parametrize(
    ("plain", "model", "space", "level", "expected"),
    [
        ({**locked({0: 0.1}), "lock": None}, MODEL, "flux2", 0, "has no lock file"),
        (locked({0: 0.1}), None, "flux2", 0, "model and latent space of the scores are not given"),
        (locked({0: 0.1}), MODEL, None, 0, "model and latent space of the scores are not given"),
        (locked({0: 0.1}), ("nano", "cd" * 32), "flux2", 0, "has none for model nano"),
        (locked({0: 0.1}), ("other", "ab" * 32), "flux2", 0, "has none for model other"),
        (locked({0: 0.1}), MODEL, "sdxl", 0, "on sdxl latents"),
        (locked({0: 0.1}), MODEL, "flux2", 2, "not for 2"),
        (locked({0: 0.1}, 0.02), MODEL, "flux2", 0, r"only 0\.01 is calibrated"),
    ],
)
def test_a_rate_that_is_not_calibrated_fails_closed(
    plain: dict[str, Any], model: Any, space: Any, level: float, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        limit_of(plain["concepts"][0], plain, model, space, level)
    verdict = judge(policy=plain, model=model, space=space, noise_level=level)
    assert verdict.decision == "block"
    assert verdict.error is not None
    assert "asks for a false-positive rate of" in verdict.error
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_a_rate_that_is_not_needed_is_not_looked_up() -> None:
    plain = locked({0: 0.1})
    plain["uncovered"] = "warn"
    verdict = judge(policy=plain, covered=[False, True, True, True])
    assert verdict.error is None
    assert verdict.concepts[0].threshold == {"kind": "fpr", "value": 0.01}


def test_limit_of() -> None:
    guns, knives = PLAIN["concepts"][:2]
    assert limit_of(knives, PLAIN) == 0.02
    assert limit_of(guns, PLAIN, logit_scale=100.0) == 0.0
    high = {**guns, "threshold": {"kind": "probability", "value": 0.9}}
    assert limit_of(high, PLAIN, logit_scale=10.0) == pytest.approx(math.log(9) / 10)
    with pytest.raises(ValueError, match="needs a logit_scale > 0, got None"):
        limit_of(guns, PLAIN)
    for value, margin in ((0.0, -math.inf), (1.0, math.inf)):
        end = {**guns, "threshold": {"kind": "probability", "value": value}}
        assert limit_of(end, PLAIN, logit_scale=1.0) == margin


def test_shipped_policies_are_all_that_decide_needs() -> None:
    for name in ("default", "family", "i2p", "observe", "weapons"):
        plain = json.loads(json.dumps(load_policy(name).to_dict()))
        begins = np.cumsum([0] + [len(c["prompts"]) for c in plain["concepts"]])[:-1]
        shape = (2, len(plain["concepts"]))
        low = decided(np.zeros(shape), np.full(shape, -0.5), [begins] * 2, plain)
        high = decided(np.ones(shape), np.full(shape, 0.5), [begins] * 2, plain)
        assert {verdict.decision for verdict in low} == {"allow"}
        assert {verdict.decision for verdict in high} == {"allow" if name == "observe" else "block"}
        assert all(score.matched for score in high[0].concepts)


def test_needs_numpy_alone() -> None:
    code = (
        "import sys, latentguard.judge;"
        "heavy = {'torch', 'pydantic', 'yaml'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "concept 'guns' has no prompts"),
        ({"noise_window": [0, math.nan]}, "concept 'guns' has no readable noise window: 0 to nan"),
        ({"noise_window": [math.nan, None]}, "concept 'guns' has no readable noise window"),
    ],
)
def test_a_concept_that_would_never_match_is_no_rule(change: dict[str, Any], message: str) -> None:
    first, *others = PLAIN["concepts"]
    with pytest.raises(ValueError, match=message):
        Rules.of(PLAIN | {"concepts": [first | change, *others]})


@pytest.mark.parametrize("margin", [math.nan, math.inf, -math.inf])
def test_a_calibrated_margin_that_is_not_finite_is_no_margin(margin: float) -> None:
    names = {"model": "m", "model_sha256": "0" * 64, "space": "flux2", "concept": "guns"}
    entry = names | {"noise_level": 0, "margins": [{"fpr": 0.01, "margin": margin}]}
    with pytest.raises(ValueError, match="the lock of concept 'guns' holds a margin that is not"):
        Rules.of(PLAIN | {"lock": {"entries": [entry]}})


def test_former_names_of_thresholds() -> None:
    score = judge().concepts[0]
    with pytest.warns(DeprecationWarning, match="limit is called threshold_value now"):
        assert score.limit == score.threshold_value
    bound = Rules.of(PLAIN).bind(ModelId("nano", "0" * 64), "flux2", 10.0)
    with pytest.warns(DeprecationWarning, match="limit is called threshold now"):
        assert bound.limit(0) == bound.threshold(0)
