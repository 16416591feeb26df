"""Every error of a policy file is one sentence with file, line and key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from latentguard.errors import LatentGuardError, PolicyError
from latentguard.policy import load_policy, parse_policy
from latentguard.policy.models import Cascade, Threshold
from latentguard.yaml_nodes import MAX_BYTES, MAX_SHOWN_ERRORS

GOOD = """\
schema_version: 1
name: test
version: "1"
templates: ["{}", "a photo of {}"]
contrast: [dog, cat]
concepts:
  - id: guns
    category: weapons
    prompts:
      - revolver
      - rifle
    threshold: {probability: 0.5}
    action: block
  - id: beer
    category: alcohol
    prompts: [a glass of beer]
    contrast: [coffee mug]
    threshold:
      margin: 0.02
    action: review
    noise_window: [0, 2]
    severity: low
schedule:
  noise: [0, 3]
  every: 2
"""

LONG = "x" * 301


def errors_of(text: str | bytes) -> tuple[str, ...]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    return caught.value.errors


def test_the_good_one_is_good() -> None:
    assert parse_policy(GOOD).name == "test"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "{probability: 0.5}",
            "{probability: 1.4}",
            "p.yaml:12: concepts[0].threshold.probability must be between 0 and 1, got 1.4",
        ),
        (
            "{probability: 0.5}",
            "{probability: -1e-3}",
            "p.yaml:12: concepts[0].threshold.probability must be between 0 and 1, got -0.001",
        ),
        (
            "{probability: 0.5}",
            "{probability: .nan}",
            "p.yaml:12: concepts[0].threshold.probability must be between 0 and 1, got nan",
        ),
        (
            "{probability: 0.5}",
            "{probability: '0.5'}",
            "p.yaml:12: concepts[0].threshold.probability must be a number, got '0.5'",
        ),
        (
            "{probability: 0.5}",
            "{probability: true}",
            "p.yaml:12: concepts[0].threshold.probability must be a number, got true",
        ),
        (
            "{probability: 0.5}",
            "{probabilty: 0.5}",
            "p.yaml:12: concepts[0].threshold.probabilty is not a known key; "
            "did you mean 'probability'?",
        ),
        (
            "{probability: 0.5}",
            "{}",
            "p.yaml:12: concepts[0].threshold must have exactly one of probability, margin "
            "and fpr, got none of them",
        ),
        (
            "{probability: 0.5}",
            "{probability: null}",
            "p.yaml:12: concepts[0].threshold must have exactly one of probability, margin "
            "and fpr, got none of them",
        ),
        (
            "{probability: 0.5}",
            "{margin: 0.1, fpr: 0.1}",
            "p.yaml:12: concepts[0].threshold must have exactly one of probability, margin "
            "and fpr, got margin and fpr",
        ),
        (
            "{probability: 0.5}",
            "0.5",
            "p.yaml:12: concepts[0].threshold must be a mapping of keys, got 0.5",
        ),
        (
            "{probability: 0.5}",
            "{fpr: 0}",
            "p.yaml:12: concepts[0].threshold.fpr must be above 0 and below 1, got 0",
        ),
        (
            "      margin: 0.02",
            "      margin: 2.5",
            "p.yaml:19: concepts[1].threshold.margin must be between -2 and 2, got 2.5",
        ),
        (
            "id: beer",
            "id: guns",
            "p.yaml:14: concepts[1].id must be unique, but 'guns' is also the id of concepts[0]",
        ),
        (
            "id: beer",
            "id: Beer Bottle",
            "p.yaml:14: concepts[1].id must be 1 to 64 of a-z, 0-9, '-' and '_', beginning with "
            "a letter or digit, got 'Beer Bottle'",
        ),
        (
            "id: beer",
            "id: 7",
            "p.yaml:14: concepts[1].id must be text, got 7; put it in quotes",
        ),
        (
            "    category: alcohol\n",
            "",
            "p.yaml:14: concepts[1].category is missing",
        ),
        (
            "      - rifle",
            "      - ''",
            "p.yaml:11: concepts[0].prompts[1] must not be empty, got ''",
        ),
        (
            "      - rifle",
            "      -",
            "p.yaml:11: concepts[0].prompts[1] must be text, got nothing",
        ),
        (
            "      - rifle",
            f"      - {LONG}",
            "p.yaml:11: concepts[0].prompts[1] must be at most 300 characters long, "
            f"got '{'x' * 57}...'",
        ),
        (
            "      - rifle",
            '      - "a\\e[31mb"',
            "p.yaml:11: concepts[0].prompts[1] must be one line of printable text, "
            "got 'a\\x1b[31mb'",
        ),
        (
            "      - rifle",
            '      - "\\x1crifle"',
            "p.yaml:11: concepts[0].prompts[1] must be one line of printable text, "
            "got '\\x1crifle'",
        ),
        (
            "prompts: [a glass of beer]",
            "prompts: []",
            "p.yaml:16: concepts[1].prompts must not be empty, got []",
        ),
        (
            "prompts: [a glass of beer]",
            "prompts: beer",
            "p.yaml:16: concepts[1].prompts must be a list, got 'beer'",
        ),
        (
            "contrast: [coffee mug]",
            "contrast: [coffee mug, A Glass of Beer]",
            "p.yaml:17: concepts[1].contrast[1] is also a prompt ('A Glass of Beer'), which "
            "could then never win",
        ),
        (
            "contrast: [dog, cat]",
            "contrast: [dog, revolver]",
            "p.yaml:5: contrast[1] is also a prompt ('revolver'), which could then never win",
        ),
        (
            "action: review",
            "action: reveiw",
            "p.yaml:20: concepts[1].action must be 'observe', 'review', 'steer' or 'block', "
            "got 'reveiw'; did you mean 'review'?",
        ),
        (
            "noise_window: [0, 2]",
            "noise_window: [2, 1]",
            "p.yaml:21: concepts[1].noise_window must not end (1) below its beginning (2), "
            "got [2, 1]",
        ),
        (
            "noise_window: [0, 2]",
            "noise_window: [-1, 2]",
            "p.yaml:21: concepts[1].noise_window must begin at 0 or above, not at -1, got [-1, 2]",
        ),
        (
            "noise_window: [0, 2]",
            "noise_window: [0, .inf]",
            "p.yaml:21: concepts[1].noise_window must end at a number, or null for no upper end, "
            "not at inf, got [0, inf]",
        ),
        (
            "noise_window: [0, 2]",
            "noise_window: 2",
            "p.yaml:21: concepts[1].noise_window must be a list of two noise levels, "
            "[low, high], got 2",
        ),
        (
            "severity: low",
            "severty: low",
            "p.yaml:22: concepts[1].severty is not a known key; did you mean 'severity'?",
        ),
        (
            "severity: low",
            "steer: {strength: 0}",
            "p.yaml:22: concepts[1].steer.strength must be above 0 and below 100, got 0",
        ),
        (
            "severity: low",
            "steer: {strength: 3}",
            "p.yaml:22: concepts[1].steer has settings of the action steer, and this concept's "
            "action is review: write action: steer, or leave it out",
        ),
        (
            "  every: 2",
            "  every: 0",
            "p.yaml:25: schedule.every must be a whole number from 1 to 1000, got 0",
        ),
        (
            "  every: 2",
            "  every: 1.5",
            "p.yaml:25: schedule.every must be a whole number from 1 to 1000, got 1.5",
        ),
        (
            '"a photo of {}"',
            '"a photo"',
            'p.yaml:4: templates[1] must hold "{}" exactly once, where the prompt goes, '
            "got 'a photo'",
        ),
        ('["{}", "a photo of {}"]', "[]", "p.yaml:4: templates must not be empty, got []"),
        (
            'version: "1"',
            "version: 1.0",
            "p.yaml:3: version must be text, got 1.0; put it in quotes",
        ),
        ("name: test\n", "", "p.yaml:1: name is missing"),
        (
            "schema_version: 1",
            "schema_version: 2",
            "p.yaml:1: schema_version must be 1, the only one known here, got 2",
        ),
        (
            "schema_version: 1",
            "schema_version: true",
            "p.yaml:1: schema_version must be 1, the only one known here, got true",
        ),
        (
            "schema_version: 1",
            'schema_version: "1"',
            "p.yaml:1: schema_version must be 1, the only one known here, got '1'",
        ),
        ("schema_version: 1\n", "", "p.yaml:1: schema_version is missing"),
        (
            "  every: 2",
            "  every: 2\non_eror: block",
            "p.yaml:26: on_eror is not a known key; did you mean 'on_error'?",
        ),
        (
            "  every: 2",
            "  every: 2\non_error: ignore",
            "p.yaml:26: on_error must be 'block', 'review' or 'allow', got 'ignore'",
        ),
        (
            "  every: 2",
            "  every: 2\nname: other",
            "p.yaml:26: key 'name' stands twice in one mapping, first in line 2",
        ),
        (
            "    action: block",
            "    action: block\n    action: observe",
            "p.yaml:14: key 'action' stands twice in one mapping, first in line 13",
        ),
        (
            "  every: 2",
            "  every: 2\n? [a, b]\n: 1",
            "p.yaml:26: a key must be plain text",
        ),
        (
            "name: test",
            "name: !!python/name:os.system",
            "p.yaml:2: YAML tags are not allowed, got 'tag:yaml.org,2002:python/name:os.system'",
        ),
        ("name: test", "name: !!str test", "p.yaml:2: YAML tags are not allowed"),
        ("name: test", "name: ! test", "p.yaml:2: YAML tags are not allowed, got '!'"),
        (
            "name: test",
            "name: *nothing",
            "p.yaml:2: alias *nothing has no complete anchor of that name before it",
        ),
        (
            "contrast: [dog, cat]",
            "contrast: &x [dog, *x]",
            "p.yaml:5: alias *x has no complete anchor of that name before it",
        ),
        ("  every: 2", "  every: 2\n---\na: 1", "p.yaml:26: a second document starts here"),
        ("[dog, cat]", "[dog, cat", "p.yaml:6: this is not valid YAML"),
        ("name: test", "\tname: test", "p.yaml:2: this is not valid YAML"),
        ("name: test", "name: a\x00b", "p.yaml:2: the file holds '\\x00', which YAML forbids"),
    ],
)
def test_error(old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) == 1, "the test changes one place"
    errors = errors_of(GOOD.replace(old, new))
    assert len(errors) == 1, errors
    assert errors[0].startswith(expected)
    assert "\n" not in errors[0]


def test_bytes_that_are_not_utf8() -> None:
    assert errors_of(b"name: x\nversion: \xff") == (
        "p.yaml:2: the file is not UTF-8: invalid start byte",
    )


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---"])
def test_nothing(text: str) -> None:
    (error,) = errors_of(text)
    assert error.startswith("p.yaml:")


@pytest.mark.parametrize("text", ["just text", "- a list", "42", "[]"])
def test_not_a_mapping(text: str) -> None:
    (error,) = errors_of(text)
    assert error.startswith("p.yaml:1: a policy must be a mapping of keys, got ")


def test_all_errors_are_collected_and_the_message_shows_the_first_few() -> None:
    text = GOOD.replace("block", "blok").replace("[0, 2]", "[2, 0]").replace("every: 2", "evry: 2")
    text = text.replace("margin: 0.02", "margin: 3").replace("{probability: 0.5}", "{fpr: 1}")
    text = text.replace('version: "1"', "version: 1").replace("severity: low", "severity: none")
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    errors = caught.value.errors
    assert [int(error.split(":")[1]) for error in errors] == [3, 12, 13, 19, 21, 22, 25]
    message = str(caught.value)
    assert message.splitlines()[:MAX_SHOWN_ERRORS] == list(errors[:MAX_SHOWN_ERRORS])
    assert message.endswith("... and 2 more")
    assert isinstance(caught.value, LatentGuardError | ValueError)


def test_size_is_bounded_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    with path.open("wb") as file:
        file.truncate(50 << 30)  # sparse: 50 GiB that take no space
    with pytest.raises(PolicyError, match=r"big\.yaml: the file is larger than 1 MiB"):
        load_policy(path)
    assert parse_policy(GOOD + "#" * (MAX_BYTES - len(GOOD))).name == "test"
    with pytest.raises(PolicyError, match="larger than 1 MiB"):
        parse_policy(GOOD + "#" * (MAX_BYTES - len(GOOD) + 1))


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    with pytest.raises(PolicyError, match="is not a regular file"):
        load_policy(path)


def test_aliases_that_explode() -> None:
    text = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        text += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    (error,) = errors_of(text)
    assert error == "p.yaml:5: the file holds more than 50,000 values, aliases expanded"


def test_ordinary_aliases_are_fine() -> None:
    text = GOOD.replace("[dog, cat]", "&shared [dog, cat]").replace("[coffee mug]", "*shared")
    policy = parse_policy(text)
    assert policy.concepts[1].contrast == ("dog", "cat")


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000])
def test_nesting_is_bounded(text: str) -> None:
    (error,) = errors_of(text)
    assert error == "p.yaml:1: nesting is deeper than 16 levels"


def test_nesting_by_aliases_is_bounded() -> None:
    text = "a: &a [x]\n" + "".join(
        f"{name}: &{name} [[*{before}]]\n"
        for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    )
    (error,) = errors_of(text)
    assert "nesting is deeper than 16 levels by an alias" in error


def test_many_errors_stay_quick() -> None:
    text = "schema_version: 1\n" + "".join(f"key{i}: 1\n" for i in range(5000))
    assert len(errors_of(text)) > 5000


def test_yaml_1_2_scalars() -> None:
    text = GOOD.replace("[dog, cat]", "[yes, off, 2024-01-01, 1:30]")
    assert parse_policy(text).contrast == ("yes", "off", "2024-01-01", "1:30")
    policy = parse_policy(GOOD.replace("{probability: 0.5}", "{fpr: 1e-3}"))
    assert policy.concepts[0].threshold.value == 0.001


def test_a_byte_order_mark_and_crlf_are_fine() -> None:
    raw = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    assert parse_policy(raw).name == "test"
    (error,) = errors_of(raw.replace(b"every: 2", b"every: 0"))
    assert error.startswith("p.yaml:25: ")


def test_the_parser_in_python_says_the_same_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyYAML comes without libyaml."""
    import yaml

    monkeypatch.setattr("latentguard.yaml_nodes._LOADER", yaml.SafeLoader)
    assert parse_policy(GOOD).name == "test"
    (error,) = errors_of(GOOD.replace("every: 2", "every: 0"))
    assert error.startswith("p.yaml:25: schedule.every must be")
    (error,) = errors_of(GOOD.replace("[dog, cat]", "[dog, cat"))
    assert error.startswith("p.yaml:6: this is not valid YAML")
    (error,) = errors_of('a: "\\UFFFFFFFF"')
    assert "this is not valid YAML" in error


@pytest.mark.parametrize("wrong", [10**400, -(10**400), b"0.5", "0.5", True])
def test_what_is_no_number_is_an_error_in_python_too(wrong: object) -> None:
    with pytest.raises(ValidationError, match="number"):
        Threshold.model_validate({"margin": wrong})


def test_text_of_another_type_is_an_error_in_python_too() -> None:
    with pytest.raises(ValidationError, match="string"):
        Cascade.model_validate({"first": b"nano-sdxl"})
