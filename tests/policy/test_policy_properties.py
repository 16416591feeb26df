"""What holds for any input: policies fail as PolicyError alone, scores never slip through."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from judging import decided

from latentguard.errors import PolicyError
from latentguard.judge import DECISIONS, ConceptScore, Verdict
from latentguard.policy import load_policy, parse_policy
from latentguard.policy.lock import parse_lock

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

TOKENS = st.sampled_from(
    [
        *("schema_version: 1", "name: x", 'version: "1"', "concepts:", "  - id: a", "    id: b"),
        *("    prompts: [gun]", "    threshold: {margin: .inf}", "    category: c", "steer:"),
        *("&a", "*a", "[", "]", "{", "}", ",", ":", "- ", "? ", "|", ">", "!!str", "---", "..."),
        *("'", '"', '"\\UFFFFFFFF"', '"\\ud800"', "%YAML 9.9", "\t", "\n", "  ", "#", "\ufeff"),
        *("null", "true", "1e999", "-.inf", "9" * 400, "\x00", "\x85", "\u2028", "\U0001f600"),
    ]
)
YAML_LIKE = st.lists(TOKENS, max_size=40).map("\n".join) | st.lists(TOKENS, max_size=40).map(
    "".join
)

LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["block", "a", "gun", "{}", "probability"])
)
KEYS = st.sampled_from(
    [
        *("schema_version", "name", "version", "concepts", "id", "category", "prompts", "contrast"),
        *("threshold", "probability", "margin", "fpr", "action", "steer", "strength", "schedule"),
        *("noise", "every", "templates", "noise_window", "severity", "entries", "margins", "other"),
    ]
)
TREE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6)
)


def reads_or_refuses(data: bytes | str) -> None:
    for read in (parse_policy, parse_lock):
        sentences: tuple[str, ...] = ("ok",)
        try:
            read(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        except PolicyError as error:
            sentences = error.errors
        assert sentences
        assert all(sentence.isprintable() for sentence in sentences)


@QUICK
@given(st.text() | YAML_LIKE)
def test_any_text_is_read_or_refused(text: str) -> None:
    reads_or_refuses(text)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    reads_or_refuses(data)


@QUICK
@given(st.dictionaries(KEYS, TREE, max_size=8))
def test_any_data_is_read_or_refused(data: dict[str, Any]) -> None:
    reads_or_refuses(yaml.safe_dump({"schema_version": 1, **data}))


DEFAULT = load_policy("default")
BASE = yaml.safe_load(
    json.dumps(
        {
            key: value
            for key, value in DEFAULT.model_dump(mode="json", exclude_none=True).items()
            if key != "concepts"
        }
    )
)
CONCEPT = {
    "id": "a",
    "category": "b",
    "prompts": ["gun"],
    "threshold": {"margin": 0},
    "action": "block",
}


@QUICK
@given(st.sampled_from([*BASE, *CONCEPT]), TREE)
def test_one_wrong_value_in_a_good_policy(key: str, value: Any) -> None:
    data = {**BASE, "concepts": [dict(CONCEPT)]}
    (data["concepts"][0] if key in CONCEPT else data)[key] = value
    text = yaml.safe_dump(data)
    reads_or_refuses(text)
    try:
        policy = parse_policy(text)
    except PolicyError:
        return
    json.dumps(policy.to_dict(), allow_nan=False)


PLAIN = parse_policy(
    """\
schema_version: 1
name: test
version: "1"
concepts:
- {id: a, category: c, prompts: [x, y], threshold: {probability: 0.7}, action: block}
- {id: b, category: c, prompts: [z], threshold: {margin: 0.1}, action: observe}
"""
).to_dict()

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4) | st.sampled_from(
    [(1, 2), (3, 2)]
)
ARRAYS = hnp.arrays(
    st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.bool_, np.complex64]), SHAPES
)


@QUICK
@given(
    ARRAYS,
    ARRAYS,
    hnp.arrays(np.int64, SHAPES, elements=st.integers(-2, 4)) | ARRAYS,
    st.floats() | st.just(0.0),
    st.booleans(),
    st.none() | st.lists(st.booleans(), max_size=3),
)
def test_any_arrays_give_verdicts(
    probability: Any, margin: Any, best: Any, noise_level: float, final: bool, covered: Any
) -> None:
    assume(covered is None or (len(covered) == 2 and all(covered)))
    verdicts = decided(
        probability,
        margin,
        best,
        PLAIN,
        covered=covered,
        noise_level=noise_level,
        final=final,
    )
    for verdict in verdicts:
        json.dumps(verdict.to_dict(), allow_nan=False)
        assert Verdict.from_dict(verdict.to_dict()) == verdict
        assert (verdict.error is None) or verdict.decision == "block"
    if not verdicts:
        assert probability.shape == margin.shape == best.shape == (0, 2)


SCORE = st.floats(0, 1) | st.sampled_from([math.nan, math.inf, -math.inf])


@QUICK
@given(st.lists(st.tuples(SCORE, SCORE, SCORE, SCORE), min_size=1, max_size=5))
def test_nan_never_becomes_allow(rows: list[tuple[float, ...]]) -> None:
    scores = np.array(rows)
    best = np.tile([1, 2], (len(rows), 1))
    verdicts = decided(scores[:, :2], scores[:, 2:], best, PLAIN)
    assert len(verdicts) == len(rows)
    for row, verdict in zip(rows, verdicts, strict=True):
        finite = all(math.isfinite(value) for value in row)
        assert (verdict.error is None) == finite
        assert verdict.decision == ("allow" if finite and row[0] < 0.7 else "block")


NUMBER = st.floats(allow_nan=False, allow_infinity=False)
SCORES = st.builds(
    ConceptScore,
    id=st.text(),
    category=st.text(),
    action=st.sampled_from(["observe", "review", "steer", "block"]),
    margin=NUMBER,
    probability=NUMBER,
    threshold=st.fixed_dictionaries(
        {"kind": st.text(), "value": NUMBER}, optional={"margin": NUMBER}
    ),
    prompt=st.text(),
    covered=st.booleans(),
    judged=st.booleans(),
    matched=st.booleans(),
)


@QUICK
@given(
    st.builds(
        Verdict,
        schema_version=st.just(1),
        decision=st.sampled_from(DECISIONS),
        reason=st.text(),
        error=st.none() | st.text(),
        noise_level=st.floats(0, allow_nan=False),
        concepts=st.lists(SCORES, max_size=3).map(tuple),
    )
)
def test_verdicts_round_trip(verdict: Verdict) -> None:
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False))) == verdict
