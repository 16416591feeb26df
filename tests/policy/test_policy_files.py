"""The policies that ship, the JSON Schema, and how a policy is found."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from latentguard.errors import PolicyError
from latentguard.policy import (
    Policy,
    json_schema,
    load_policy,
    parse_policy,
    shipped_policies,
)

FOLDER = Path(__file__).resolve().parents[2] / "policies"
NAMES = ["default", "family", "i2p", "observe", "weapons"]

MINIMAL = """\
schema_version: 1
name: minimal
version: "1"
concepts:
  - id: guns
    category: weapons
    prompts: [revolver, rifle]
    threshold: {probability: 0.5}
    action: block
"""


def test_what_ships() -> None:
    assert sorted(shipped_policies()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_policy(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    assert policy.on_error != "allow"
    assert all(concept.prompts for concept in policy.concepts)
    assert all(policy.contrast_of(concept) for concept in policy.concepts)
    assert policy.description
    text = shipped_policies()[name].read_bytes()
    assert policy.sha256 == hashlib.sha256(text).hexdigest()
    json.dumps(policy.to_dict(), allow_nan=False)


def test_shipped_policies_keep_their_promises() -> None:
    assert {c.action for c in load_policy("observe").concepts} == {"observe"}
    assert load_policy("observe").uncovered == "warn"
    assert load_policy("family").uncovered == "warn"
    # What the bundled models cannot see must be an error here, not a mark that nobody reads.
    assert load_policy("i2p").uncovered == "error"
    assert load_policy("default").uncovered == "error"
    assert [c.category for c in load_policy("i2p").concepts] == [
        "hate",
        "harassment",
        "violence",
        "self-harm",
        "sexual",
        "shocking",
        "illegal-activity",
    ]
    family = {c.category for c in load_policy("family").concepts}
    assert {"alcohol", "tobacco", "gambling", "weapons", "swimwear", "drugs"} <= family


def test_schema_file_is_current() -> None:
    text = (FOLDER / "policy.schema.json").read_text()
    assert text == json.dumps(json_schema(), indent=2) + "\n", (
        "run: latentguard policy schema > policies/policy.schema.json"
    )


@pytest.mark.parametrize("name", NAMES)
def test_shipped_policy_fits_the_schema_that_it_names(name: str) -> None:
    path = shipped_policies()[name]
    text = path.read_text()
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert found, "the first line tells editors the schema"
    schema = json.loads((path.parent / found[1]).read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("concepts", 0, "threshold"), {"probability": 1.4}),
        (("concepts", 0, "threshold"), {"probability": 0.4, "margin": 0.1}),
        (("concepts", 0, "threshold"), {}),
        (("concepts", 0, "threshold"), {"fpr": 0}),
        (("concepts", 0, "action"), "blok"),
        (("concepts", 0, "prompts"), []),
        (("concepts", 0, "prompts"), [" "]),
        (("concepts", 0, "prompts"), "revolver"),
        (("concepts", 0, "id"), "Not A Slug"),
        (("concepts", 0, "noise_window"), [1]),
        (("concepts", 0, "treshold"), 1),
        (("concepts",), []),
        (("templates",), ["a photo"]),
        (("templates",), ["{} and {}"]),
        (("schema_version",), 2),
        (("version",), 1.0),
        (("schedule",), {"every": 0}),
        (("unknown",), 1),
    ],
)
def test_schema_and_loader_refuse_the_same(path: tuple[Any, ...], value: Any) -> None:
    data = yaml.safe_load(MINIMAL)
    target = data
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    assert list(jsonschema.Draft7Validator(json_schema()).iter_errors(data))
    with pytest.raises(PolicyError):
        parse_policy(yaml.safe_dump(data))


def test_schema_and_loader_accept_all_keys() -> None:
    text = MINIMAL.replace("action: block", "action: steer") + (
        "    description: hand guns\n"
        "    contrast: [toy]\n"
        "    severity: critical\n"
        "    steer: {strength: 2}\n"
        "    noise_window: [0, null]\n"
        "description: |\n  two\n\n  paragraphs\n"
        "model: nano-flux2\n"
        "space: flux2\n"
        "templates: ['{}', 'a photo of {}']\n"
        "contrast: [dog]\n"
        "schedule: {noise: [0, 2.5], every: 2}\n"
        "on_error: review\n"
        "on_block: raise\n"
        "uncovered: warn\n"
    )
    jsonschema.Draft7Validator(json_schema()).validate(yaml.safe_load(text))
    policy = parse_policy(text)
    assert policy.schedule.noise == (0.0, 2.5)
    assert policy.concepts[0].noise_window == (0.0, None)
    assert policy.texts("a gun") == ("a gun", "a photo of a gun")
    assert policy.contrast_of(policy.concepts[0]) == ("toy", "dog")


def test_defaults() -> None:
    policy = parse_policy(MINIMAL)
    assert (policy.on_error, policy.on_block, policy.uncovered) == ("block", "blank", "error")
    assert policy.templates == ("{}",)
    assert policy.model is None
    assert policy.space is None
    assert policy.lock is None
    concept = policy.concepts[0]
    assert (concept.severity, concept.steer, concept.noise_window) == ("medium", None, (0.0, None))


def test_schedule() -> None:
    schedule = parse_policy(MINIMAL + "schedule: {noise: [0.5, 2], every: 3}\n").schedule
    assert [schedule.due(step, 1.0) for step in range(4)] == [True, False, False, True]
    assert [schedule.due(0, level) for level in (0.4, 0.5, 2.0, 2.1)] == [False, True, True, False]


def test_a_policy_is_frozen() -> None:
    policy = parse_policy(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        policy.on_error = "allow"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        policy.concepts[0].action = "observe"  # type: ignore[misc]


def test_a_changed_copy_has_another_digest() -> None:
    policy = parse_policy(MINIMAL)
    assert policy.model_copy().sha256 == policy.sha256
    changed = policy.model_copy(update={"on_error": "review"})
    assert changed.sha256 != policy.sha256
    assert changed.sha256 != policy.model_copy(update={"on_error": "allow"}).sha256


def test_a_policy_made_in_python_has_a_digest_of_its_content() -> None:
    data = yaml.safe_load(MINIMAL)
    one, same = Policy(**data), Policy(**data)
    assert one.sha256 == same.sha256
    data["version"] = "2"
    assert Policy(**data).sha256 != one.sha256


def test_plain_is_complete() -> None:
    plain = parse_policy(MINIMAL.replace("block", "steer")).to_dict()
    assert plain["concepts"][0]["threshold"] == {"kind": "probability", "value": 0.5}
    assert plain["concepts"][0]["steer"] == {"strength": 1.0, "iterations": 5}
    assert plain["concepts"][0]["noise_window"] == [0.0, None]
    assert plain["lock"] is None
    assert plain["schema_version"] == 1
    assert len(plain["sha256"]) == 64
    assert parse_policy(MINIMAL).to_dict()["concepts"][0]["steer"] is None


def test_load_by_path_by_name_and_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    policy = load_policy(path)
    assert policy.name == "minimal"
    assert load_policy(str(path)) == policy
    assert load_policy(policy) is policy


def test_a_shipped_name_wins_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_policy("default").name == "default"
    assert load_policy("./default").name == "minimal"


def test_unknown_name_suggests_and_lists() -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy("famly")
    message = str(caught.value)
    assert "no policy is named 'famly'; did you mean 'family'?" in message
    assert all(name in message for name in NAMES)


@pytest.mark.parametrize("given", [{"name": "family"}, 3, None])
def test_what_is_no_policy(given: Any) -> None:
    with pytest.raises(PolicyError, match=f"or a Policy, got {type(given).__name__}"):
        load_policy(given)


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000, "../\0.yaml", "no/such/file.yaml"])
def test_unusable_names(name: str) -> None:
    with pytest.raises(PolicyError):
        load_policy(name)


def test_a_folder_is_not_a_policy(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="is a folder, not a file"):
        load_policy(tmp_path)


def test_five_thousand_prompts_load(tmp_path: Path) -> None:
    prompts = ", ".join(f"thing number {i}" for i in range(5000))
    path = tmp_path / "large.yaml"
    path.write_text(MINIMAL.replace("revolver, rifle", prompts))
    assert len(load_policy(path).concepts[0].prompts) == 5000


def test_the_former_name_of_to_dict() -> None:
    policy = parse_policy(MINIMAL)
    with pytest.warns(DeprecationWarning, match=r"Policy\.plain is called to_dict now"):
        assert policy.plain() == policy.to_dict()
