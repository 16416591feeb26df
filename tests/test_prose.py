"""American spelling, in code as in prose."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Beginnings of British words, behind whatever stands before them in a name.
BRITISH = [
    "acknowledgement",
    "aluminium",
    "amongst",
    "anticlockwise",
    "artefact",
    "authoris",
    "behaviour",
    "cancelled",
    "cancelling",
    "capitalis",
    "catalogue",
    "centimetre",
    "centre",
    "characteris",
    "colour",
    "customis",
    "defence",
    "discretis",
    "emphasis(e|ing)",
    "equalis",
    "favour",
    "finalis",
    "generalis",
    "grey",
    "honour",
    "initialis",
    "judgement",
    "kilometre",
    "labelled",
    "labelling",
    "learnt",
    "licence",
    "localis",
    "materialis",
    "maximis",
    "memoris",
    "millimetre",
    "minimis",
    "modelled",
    "modelling",
    "neighbour",
    "normalis",
    "optimis(e|ation|ing)",
    "organis",
    "parallelis",
    "parametris",
    "penalis",
    "practis",
    "prioritis",
    "programme\\b",
    "quantis",
    "rasteris",
    "recognis",
    "regularis",
    "sceptic",
    "serialis",
    "skilful",
    "specialis",
    "spelt",
    "stabilis",
    "standardis",
    "storey",
    "summaris",
    "synchronis",
    "tokenis",
    "travelled",
    "travelling",
    "utilis",
    "vectoris",
    "visualis",
    "whilst",
    "analys(e|ing)\\b",
]
FOUND = re.compile(rf"(?<![a-z])(?:un|re|de|pre)?(?:{'|'.join(BRITISH)})", re.IGNORECASE)

# What is quoted from elsewhere, or not prose.
ELSEWHERE = ("tests/test_prose.py", "LICENSE", "constraints.txt")
QUOTED = re.compile(r"recognise\b.*recognize\b")  # a former name


def british(text: str) -> list[str]:
    """The words of a text that are spelled the British way."""
    lines = (line for line in text.splitlines() if not QUOTED.search(line))
    return [match[0] for line in lines for match in FOUND.finditer(line)]


def files() -> list[Path]:
    """Text files under version control."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "grep", "-Il", ""], capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("needs a checkout with git")
    return [ROOT / name for name in listed.stdout.splitlines() if name not in ELSEWHERE]


def test_american_spelling() -> None:
    read = ((path, path.read_text(encoding="utf-8", errors="replace")) for path in files())
    found = {str(path.relative_to(ROOT)): words for path, text in read if (words := british(text))}
    assert found == {}


@pytest.mark.parametrize(
    "word", ["Colours", "on_colour", "uninitialised", "Quantisation", "artefacts", "re-centred"]
)
def test_british_words_are_found(word: str) -> None:
    assert british(f"a {word} b") != []


@pytest.mark.parametrize("word", ["optimist", "emphasis", "programmer", "analysis", "centered"])
def test_other_words_are_not(word: str) -> None:
    assert british(f"a {word} b") == []
