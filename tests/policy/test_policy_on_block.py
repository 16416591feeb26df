"""`on_block`: a word, or a word with its settings."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from latentguard.errors import PolicyError
from latentguard.policy import json_schema, parse_policy

TEXT = """schema_version: 1
name: x
version: "1"
on_block: {}
concepts:
  - {{id: a, category: b, prompts: [c], threshold: {{margin: 0.1}}, action: block}}
"""


@pytest.mark.parametrize(
    ("given", "answer", "retries", "dumped"),
    [
        ("blank", "blank", 0, "blank"),
        ("raise", "raise", 0, "raise"),
        ("callback", "callback", 0, "callback"),
        ("blur", "blur", 0, "blur"),
        ("placeholder", "placeholder", 0, "placeholder"),
        ("retry", "retry", 3, "retry"),
        ("{retry: 7}", "retry", 7, {"retry": 7}),
    ],
)
def test_every_form(given: str, answer: str, retries: int, dumped: Any) -> None:
    text = TEXT.format(given)
    jsonschema.Draft7Validator(json_schema()).validate(yaml.safe_load(text))
    policy = parse_policy(text)
    assert (policy.answer, policy.retries) == (answer, retries)
    assert policy.to_dict()["on_block"] == dumped


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("blury", r"must be 'blank', .* or 'retry', got 'blury'; did you mean 'blur'\?"),
        ("3", "must be 'blank', .* got 3"),
        ("[blur]", r"must be 'blank', .* got \['blur'\]"),
        ("{}", "must have exactly one of retry and placeholder, got neither"),
        ("{retry: 1, placeholder: x.png}", "must have exactly one .*, got both"),
    ],
)
def test_what_is_none_is_told_with_its_line(given: str, says: str) -> None:
    _refused(given, rf"^policy:4: on_block {says}$")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{retry: 0}", "retry must be a whole number from 1 to 20, got 0"),
        ("{retry: 21}", "retry must be a whole number from 1 to 20, got 21"),
        ("{retri: 1}", r"retri is not a known key; did you mean 'retry'\?"),
        ("{placeholder: 3}", "placeholder must be text, got 3; put it in quotes"),
    ],
)
def test_settings_that_are_none_are_told_with_their_key(given: str, says: str) -> None:
    _refused(given, rf"^policy:4: on_block\.{says}$")


@pytest.mark.parametrize(
    "path", ["/etc/a.png", "../a.png", "a/../../b.png", "C:/a.png", "\\\\a\\b"]
)
def test_a_placeholder_lies_in_the_policys_folder(path: str) -> None:
    with pytest.raises(PolicyError, match="must be the path of a file in the policy's folder"):
        parse_policy(TEXT.format(f"{{placeholder: '{path}'}}"))


def _refused(given: str, says: str) -> None:
    text = TEXT.format(given)
    assert list(jsonschema.Draft7Validator(json_schema()).iter_errors(yaml.safe_load(text)))
    with pytest.raises(PolicyError, match=says):
        parse_policy(text)
