"""Verdicts in the words of published hazard schemes."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.judge import (
    Categories,
    ModelId,
    Rules,
    Verdict,
    categorize,
    decide,
    failed,
    with_taxonomies,
)
from latentguard.policy import parse_policy

POLICY = """
schema_version: 1
name: made
version: "1"
uncovered: warn
concepts:
  - id: guns
    category: weapons
    prompts: [revolver, musket]
    threshold: {probability: 0.5}
    action: block
    severity: low
    noise_window: [0, 2]
    taxonomy: {azure: [Violence], rekognition: [Weapons]}
  - id: gore
    category: violence
    prompts: [blood]
    threshold: {probability: 0.5}
    action: observe
    severity: critical
    taxonomy: {azure: [Violence], rekognition: [Blood & Gore]}
  - id: nudity
    category: sexual
    prompts: [a naked person]
    threshold: {probability: 0.5}
    action: block
    taxonomy: {azure: [Sexual]}
  - id: beer
    category: alcohol
    prompts: [beer]
    threshold: {probability: 0.5}
    action: block
"""
PLAIN = parse_policy(POLICY).to_dict()
RULES = Rules.of(PLAIN)
IDS = list(RULES.ids)
BEST = np.array([[0, 2, 3, 4]])


def judged(
    *probabilities: float,
    unseen: tuple[str, ...] = (),
    noise_level: float = 0.0,
    final: bool = True,
) -> Verdict:
    """A verdict by a model that sees none of the prompts in `unseen`."""
    seen = [prompt not in unseen for prompt in RULES.prompts]
    bound = RULES.bind(ModelId("seer", "0" * 64), "flux2", 10.0, seen=seen)
    p = np.array([probabilities])
    (verdict,) = decide(p, np.zeros_like(p), BEST, bound, noise_level, final)
    return verdict


def test_flags_scores_and_levels() -> None:
    found = categorize(judged(0.7, 0.2, 0.1, 0.9), RULES, "azure")
    assert found.flagged == ("Violence",)
    assert found.scores == {"Sexual": 0.1, "Violence": 0.7}
    assert found.severities == {"Sexual": 0, "Violence": 2}  # guns are of low severity
    assert found.unchecked == {}
    assert found.version == "2024-09-01"


def test_the_gravest_concept_that_matched_gives_the_level_whatever_its_action() -> None:
    found = categorize(judged(0.9, 0.6, 0.1, 0.1), RULES, "azure")
    assert found.severities == {"Sexual": 0, "Violence": 6}
    assert found.scores["Violence"] == 0.9


def test_what_no_concept_could_see_is_none_with_the_reason_and_never_0() -> None:
    verdict = judged(0.1, 0.9, 0.9, 0.1, unseen=("blood", "a naked person"))
    found = categorize(verdict, RULES, "azure")
    assert found.flagged == ()
    assert found.scores == {"Sexual": None, "Violence": 0.1}
    assert found.severities == {"Sexual": None, "Violence": 0}
    assert found.unchecked == {
        "Sexual": "seer cannot see 'nudity'",
        "Violence": "seer cannot see 'gore'",
    }


def test_prompts_that_were_not_checked_are_named() -> None:
    found = categorize(judged(0.1, 0.1, 0.1, 0.1, unseen=("musket",)), RULES, "azure")
    assert found.scores["Violence"] == 0.1
    assert found.unchecked == {"Violence": "seer cannot see 'musket' of 'guns'"}


def test_a_concept_outside_of_its_window_is_not_scored() -> None:
    verdict = judged(0.9, 0.1, 0.1, 0.1, noise_level=5.0, final=False)
    found = categorize(verdict, RULES, "azure")
    assert found.scores["Violence"] == 0.1
    assert found.unchecked == {"Violence": "'guns' not judged at noise level 5"}


def test_an_image_that_could_not_be_judged_has_no_scores() -> None:
    found = categorize(failed("a broken file", RULES), RULES, "azure")
    assert found.scores == {"Sexual": None, "Violence": None}
    assert found.severities == {"Sexual": None, "Violence": None}
    assert found.unchecked["Sexual"] == "'nudity' could not be judged (a broken file)"
    found = categorize(judged(float("nan"), 0.6, 0.1, 0.1), RULES, "azure")
    assert found.scores["Violence"] == 0.6
    assert "'guns' could not be judged" in found.unchecked["Violence"]


def test_a_category_counts_for_those_that_hold_it() -> None:
    found = categorize(judged(0.2, 0.8, 0.1, 0.1), RULES, "rekognition")
    assert found.flagged == ("Violence", "Graphic Violence", "Blood & Gore")
    assert found.scores == {
        "Violence": 0.8,
        "Weapons": 0.2,
        "Graphic Violence": 0.8,
        "Blood & Gore": 0.8,
    }
    assert found.severities is None


def test_every_category_can_be_asked_for() -> None:
    found = categorize(judged(0.9, 0.1, 0.1, 0.1), RULES, "azure", every=True)
    assert list(found.scores) == ["Hate", "SelfHarm", "Sexual", "Violence"]
    assert found.scores["Hate"] is None
    assert found.unchecked["Hate"] == "no concept of policy 'made' is mapped to it"


def test_a_scheme_that_the_policy_is_not_mapped_to() -> None:
    with pytest.raises(ValueError, match="'made' maps no concept to the taxonomy 'openai'; those"):
        categorize(judged(0.1, 0.1, 0.1, 0.1), RULES, "openai")


def test_a_verdict_carries_them_there_and_back() -> None:
    verdict = judged(0.9, 0.1, 0.1, 0.1, unseen=("a naked person",))
    assert "taxonomies" not in verdict.to_dict()
    told = with_taxonomies(verdict, RULES, ["azure", "rekognition"])
    data = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    assert data["taxonomies"]["azure"] == {
        "version": "2024-09-01",
        "names": {"Sexual": "Sexual", "Violence": "Violence"},
        "flagged": ["Violence"],
        "scores": {"Sexual": None, "Violence": 0.9},
        "unchecked": {"Sexual": "seer cannot see 'nudity'"},
        "severities": {"Sexual": None, "Violence": 2},
    }
    assert Verdict.from_dict(data) == told
    assert with_taxonomies(verdict, RULES, []) is verdict


@pytest.mark.parametrize(
    "change",
    [
        {"scores": {"Sexual": True}},
        {"scores": {"Sexual": "0.5"}},
        {"scores": []},
        {"flagged": ["Hate"]},
        {"names": {}},
        {"severities": {"Hate": 2}},
        {"version": ...},
    ],
)
def test_categories_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    data = categorize(judged(0.9, 0.1, 0.1, 0.1), RULES, "azure").to_dict() | change
    data = {key: value for key, value in data.items() if value is not ...}
    with pytest.raises(ValueError, match="verdict: taxonomies: "):
        Categories.from_dict("azure", data)


def test_rules_of_an_untrusted_file_are_checked() -> None:
    azure = PLAIN["taxonomies"]["azure"]
    twice = [{"id": "a", "name": "a", "parent": None}, {"id": "a", "name": "a", "parent": "a"}]
    for change, says in (
        ({"categories": twice}, "has the category 'a' twice"),
        ({"categories": [{"id": "a", "name": "a", "parent": "a"}]}, "has no 'a' before 'a'"),
        ({"categories": [{}] * 1001}, "more than 1,000 categories"),
        ({"categories": []}, "is mapped to 'Violence' of taxonomy 'azure', which is not there"),
        ({"severities": {"low": 1}}, "no level for each severity"),
        ({"severities": {**azure["severities"], "low": "x"}}, "no level for each severity"),
        ({"categories": 7}, "cannot be read"),
        ({"categories": [7]}, "cannot be read"),
    ):
        data = copy.deepcopy(PLAIN)
        data["taxonomies"]["azure"] |= change
        with pytest.raises(ValueError, match=says):
            Rules.of(data)
    for broken in ([], "x", {"azure": 7}, {"azure": None}):
        with pytest.raises(ValueError, match="policy: "):
            Rules.of({**PLAIN, "taxonomies": broken})


def test_files_of_former_versions_have_no_mapping() -> None:
    data = copy.deepcopy(PLAIN)
    del data["taxonomies"]
    for concept in data["concepts"]:
        del concept["taxonomy"]
    assert Rules.of(data).schemes == {}


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.sets(st.sampled_from(RULES.prompts), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_a_score_is_known_exactly_where_a_concept_was_judged(
    probabilities: list[float], unseen: set[str]
) -> None:
    verdict = judged(*probabilities, unseen=tuple(unseen))
    by_id = {score.id: score for score in verdict.concepts}
    for scheme in RULES.schemes:
        found = categorize(verdict, RULES, scheme)
        for category, rules in RULES.mapped[scheme].items():
            seen = [by_id[rule.id] for rule in rules if by_id[rule.id].covered]
            expected = max((score.probability for score in seen), default=None)
            assert found.scores[category] == expected
            assert (category in found.flagged) == any(score.matched for score in seen)
            assert expected is not None or category in found.unchecked
