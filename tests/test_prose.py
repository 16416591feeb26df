"""American spelling, in code as in prose."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Beginnings of British words; `$` where the whole word is meant.
BRITISH = r"""
    acknowledgement|afterwards|ageing|aluminium|amidst|amongst|analys(e[dr]?|ing)$|anticlockwise|
    apologis|armour|artefact|authoris|backwards|behaviour|burnt|cancelled|cancelling|capitalis|
    catalogu|categoris|centimetre|centr(e|es|ed|ing)$|channelled|characteris|cheque$|colour|
    criticis|customis|defence|digitis|discretis|downwards|emphasis(e|ing)|endeavour|equalis|favour|
    fibre|finalis|flavour|focuss|formalis|forwards|fulfil(s|ment)?$|generalis|grey|harmonis|
    honour|humour|initialis|instalment|inwards|itemis|jewell|judgement|kilometre|labelled|
    labelling|labour|learnt|levelled|licence|linearis|localis|manoeuv|materialis|maths$|maximis|
    memoris|metre$|millimetre|minimis|modelled|modelling|modernis|mould|neighbour|neutralis|
    normalis|offence|optimis|organis|orientated|outwards|paralys|parallelis|
    parametris|penalis|plough|practis|pretence|prioritis|programmes?$|quantis|randomis|rasteris|
    realis(e|ing|ation)|recognis|regularis|rumour|sceptic|serialis|signalled|signalling|skilful|
    specialis|spelt|spoilt|stabilis|standardis|storey|summaris|symbolis|symmetris|synchronis|
    theatre|tokenis|tonne$|totalled|towards|travelled|travelling|tumour|tunnelled|upwards|utilis|
    vapour|vectoris|visualis|whilst
"""
BEFORE = "(?:un|re|de|dis|mis|pre|non|over|sub|multi)?"
FOUND = re.compile(f"(?!.*is[mt]s?$){BEFORE}(?:{BRITISH})", re.VERBOSE)  # no specialist

# The parts of names, too: on_colour, onColour.
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

# Others' names, and former ones of this project.
QUOTED = re.compile(r"primary: blue grey|\.cancelled\(\)|\brecognise\b.*\brecognize\b")
ELSEWHERE = {
    "LICENSE",
    "constraints.txt",
    "latentguard/runtime/artefact.py",
    "tests/runtime/test_former_artifact.py",
    "tests/test_prose.py",
}


def british(text: str) -> set[str]:
    """The words of a text that are spelled the British way."""
    words = {word.lower() for word in WORD.findall(QUOTED.sub("", text))}
    return {word for word in words if FOUND.match(word)}


def files() -> list[str]:
    """Names of the text files under version control."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "grep", "-Il", ""], capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("needs a checkout with git")
    return sorted(set(listed.stdout.splitlines()) - ELSEWHERE)


def test_american_spelling() -> None:
    found = {}
    for name in files():
        text = Path(ROOT, name).read_text(encoding="utf-8", errors="replace")
        if words := british(name) | british(text):
            found[name] = words
    assert found == {}


@pytest.mark.parametrize(
    "word",
    [
        "Colours",
        "on_colour",
        "onColour",
        "COLOURS",
        "uninitialised",
        "Quantisation",
        "artefacts",
        "re-centred",
        "programme",
        "towards",
    ],
)
def test_british_words_are_found(word: str) -> None:
    assert british(f"a {word} b") != set()


@pytest.mark.parametrize(
    "word",
    ["specialists", "organism", "emphasis", "programmer", "analysis", "centered", "parameter"],
)
def test_other_words_are_not(word: str) -> None:
    assert british(f"a {word} b") == set()


def test_others_names_may_be_quoted() -> None:
    assert british("if job.cancelled():") == set()
    assert british('former_names(__name__, {"recognise": "recognize"})') == set()
