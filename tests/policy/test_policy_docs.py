"""docs/policies.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from judging import decided

from latentguard import yaml_nodes as bounds
from latentguard.policy import (
    Concept,
    LockEntry,
    Policy,
    Schedule,
    Threshold,
    parse_lock,
    parse_policy,
    shipped_policies,
)

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
EXAMPLE, LOCK = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def test_the_examples_are_valid() -> None:
    assert parse_policy(EXAMPLE).name == "kitchen-shop"
    assert parse_lock(LOCK.encode()).entries[0].concept == "guns"


def test_the_quoted_reason() -> None:
    policy = parse_policy(EXAMPLE).to_dict()
    (verdict,) = decided([[0.93, 0.1]], [[0.1, 0.0]], [[0, 3]], policy)
    assert f"    {verdict.reason}\n" in TEXT


@pytest.mark.parametrize("model", [Policy, Concept, Threshold, Schedule])
def test_every_key_has_a_row(model: type) -> None:
    for key in model.model_fields:
        assert f"| `{key}` |" in TEXT


def test_every_key_of_a_lock_is_shown() -> None:
    assert set(LockEntry.model_fields) == set(yaml.safe_load(LOCK)["entries"][0])


def test_every_shipped_policy_has_a_row() -> None:
    for name in shipped_policies():
        assert f"| `{name}` |" in TEXT


def test_the_bounds() -> None:
    assert bounds.MAX_BYTES == 1 << 20
    assert f"nested at most {bounds.MAX_DEPTH}" in TEXT
    assert f"at most {bounds.MAX_VALUES:,} values" in TEXT
