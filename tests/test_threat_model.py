"""docs/threat-model.md names tests that exist, and every way past the guard that is tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "threat-model.md").read_text("utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")]
FOLDER = re.compile(r"\| `tests/(\w+)/` \| (.+) \|")
FILE = re.compile(r"(\w+) `(test_\w+\.py)`")
GROUP = re.compile(r"(\w+) (`test_\w+`(?:, `test_\w+`)*)")


def _files() -> dict[str, Path]:
    """The file that each word of the page stands for."""
    found = {}
    for folder, files in (match.groups() for match in map(FOLDER.fullmatch, ROWS) if match):
        for word, name in FILE.findall(files):
            assert word not in found, f"{word!r} stands for two files"
            found[word] = TESTS / folder / name
    return found


def _tests(file: Path) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", file.read_text("utf-8"), re.M))


FILES = _files()
LISTED = [
    (word, name) for word, names in GROUP.findall(TEXT) for name in re.findall(r"test_\w+", names)
]


def test_every_test_that_is_named_exists() -> None:
    assert len(LISTED) == len(re.findall(r"`test_\w+`", TEXT)), "a test without its file's word"
    have = {word: _tests(file) for word, file in FILES.items()}
    assert not [(word, name) for word, name in LISTED if name not in have.get(word, ())]


def test_every_word_is_used() -> None:
    assert set(FILES) == {word for word, _ in LISTED}


@pytest.mark.parametrize("word", ["bypass", "changes"])
def test_every_way_past_the_guard_is_listed(word: str) -> None:
    assert {name for one, name in LISTED if one == word} == _tests(FILES[word])


def test_every_differential_fuzz_is_listed() -> None:
    fuzz = set((TESTS / "fuzz").glob("test_fuzz_*.py"))
    assert fuzz == {file for file in FILES.values() if file.parent.name == "fuzz"}


def test_the_count_of_ways_is_true() -> None:
    lines = TEXT[TEXT.index("\n## Files\n") : TEXT.index("\n## Differential fuzz\n")].splitlines()
    tried = sum(line.startswith("| ") and "`test_" in line for line in lines)
    assert f"{tried} such lines" in " ".join(TEXT.split())
    assert f"{tried} ways" in (TESTS.parent / "README.md").read_text("utf-8")
