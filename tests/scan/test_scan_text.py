"""Untrusted text: nothing unseen is shown, nothing is evaluated by a spreadsheet."""

from __future__ import annotations

import csv
import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scan_helpers import HOSTILE

from latentguard.scan.text import spreadsheet_cell, visible
from latentguard.text import unseen

ANY_TEXT = st.text(st.characters(categories=None), max_size=300) | st.sampled_from(HOSTILE)
FORMULA = tuple("=+-@＝＋－＠")


@given(ANY_TEXT)
def test_visible_is_one_line_of_seen_characters(text: str) -> None:
    shown = visible(text)
    assert len(shown) <= 200
    assert all(unicodedata.category(c)[0] not in "C" for c in shown)
    assert shown.splitlines() in ([], [shown])
    shown.encode("utf-8")


@given(st.text(alphabet="abc 123äß漢é-_.", max_size=200))
def test_visible_leaves_plain_text_alone(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    "hidden",
    list("\u3164\u115f\uffa0\ufe0f\u034f\u2800\u200b\u00a0\u3000\u202e\U000e0041\U000e0100"),
)
def test_names_that_differ_in_what_is_not_seen_look_different(hidden: str) -> None:
    shown = visible(f"cat{hidden}")
    assert shown.isascii()
    assert shown.startswith("cat\\")
    assert unseen(f"cat{hidden}") == shown.removeprefix("cat")
    assert unseen("cat") is None


def test_a_flood_of_marks_is_not_drawn_over_other_lines() -> None:
    shown = visible("a" + "\u0301" * 40, limit=1000)
    assert shown.count("\u0301") == 4
    assert shown.count(r"\u0301") == 36
    assert visible("\u0301a") == r"\u0301a"


@pytest.mark.parametrize("text", ["กั้น", "नमस्ते", "e\u0301te\u0301", "Việt", "😀", "日本語", "שָׁלוֹם"])
def test_writing_systems_with_marks_stay_as_they_are(text: str) -> None:
    assert visible(text) == text
    assert unseen(text) is None


def test_visible_keeps_both_ends_of_what_is_too_long() -> None:
    shown = visible("/data/" + "x" * 500 + "/beer.pt", limit=40)
    assert len(shown) == 40
    assert shown.startswith("/data/")
    assert shown.endswith("/beer.pt")


@given(ANY_TEXT)
def test_no_cell_begins_a_formula_whatever_the_delimiter(text: str) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerow([spreadsheet_cell(text), "next"])
    for delimiter in ",;|\t":
        for row in csv.reader(io.StringIO(file.getvalue(), newline=""), delimiter=delimiter):
            assert not [cell for cell in row if cell.lstrip().startswith(FORMULA)]


@pytest.mark.parametrize("text", ["beer.pt", "a-b", "3 + 4", "x=y", "it's"])
def test_harmless_cells_stay_as_they_are(text: str) -> None:
    assert spreadsheet_cell(text) == text
