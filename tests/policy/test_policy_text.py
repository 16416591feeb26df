"""What policies call themselves: nothing unseen in names, and every language in texts."""

from __future__ import annotations

import pytest

from latentguard.errors import PolicyError
from latentguard.policy import parse_policy

POLICY = """
schema_version: 1
name: NAME
version: "VERSION"
description: DESCRIPTION
concepts:
  - id: ID
    category: weapons
    prompts: ["PROMPT"]
    threshold: {probability: 0.5}
    action: block
"""
PLAIN = {"NAME": "p", "VERSION": "1", "DESCRIPTION": "x", "ID": "guns", "PROMPT": "revolver"}


def policy(**changes: str) -> str:
    text = POLICY
    for key, value in (PLAIN | changes).items():
        text = text.replace(key, value)
    return text


@pytest.mark.parametrize("hidden", ["\u3164", "\ufe0f", "\u115f", "\u034f", "\u2800"])
@pytest.mark.parametrize(("key", "line"), [("NAME", 3), ("VERSION", 4), ("ID", 7)])
def test_a_name_with_a_character_that_is_not_seen(hidden: str, key: str, line: int) -> None:
    with pytest.raises(PolicyError, match=rf"p.yaml:{line}: .*must ") as caught:
        parse_policy(policy(**{key: PLAIN[key] + hidden}), "p.yaml")
    assert hidden not in str(caught.value)
    assert f"\\u{ord(hidden):04x}" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["револьвер", "リボルバー　銃", "ปืนพก", "रिवॉल्वर", "مسدس", "אקדח", "súng lục", "❤️ 🔫"]
)
def test_texts_of_other_languages_load(text: str) -> None:
    found = parse_policy(policy(DESCRIPTION=text.replace("\u3000", " "), PROMPT=text.split()[0]))
    assert found.concepts[0].prompts == (text.split()[0],)
