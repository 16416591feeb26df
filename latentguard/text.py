"""Text from untrusted files (ids, paths, messages), made safe to show.

A latents file may be named, or name its records, by whoever wants a moderator to see something
else: terminal escape sequences, right-to-left overrides, characters without a look, which make two
names look alike. The metadata of an exported file and the errors of libraries are no better.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Control, format (bidirectional overrides, zero-width characters, tags), surrogate and private-use
# characters, line and paragraph separators: none of them has a look of its own.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

# Letters, marks and symbols that have none either (Default_Ignorable_Code_Point in Unicode's
# DerivedCoreProperties, and the blank of Braille).
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)

_MARKS = 4
"""Marks that may stand over and under one letter; writing systems and emoji need no more."""


def visible(text: object, limit: int = 200) -> str:
    """`text` on one line with nothing unseen in it, the middle left out beyond `limit` characters.

    Every character without a look of its own is written as its escape (`\\x1b`, `\\u202e`), so
    that two different ids stay different to the eye. So is a space other than the common one, and
    a mark that has no letter to stand on, or more than four others on the same letter.
    """
    shown = "".join(_shown(str(text)))
    if len(shown) <= limit:
        return shown
    head = (limit - 1) // 2
    return f"{shown[:head]}…{shown[len(shown) - (limit - 1 - head) :]}"


def unseen(text: str) -> str | None:
    """The first part of a text that `visible` would escape, escaped; None where all is seen."""
    for character, shown in zip(text, _shown(text), strict=True):
        if character != shown:
            return shown
    return None


def counted(number: int, noun: str = "") -> str:
    """`1,234 images`, `1 image`; without a noun the number alone."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if noun else f"{number:,}"


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """The gist of a library's error: the first line of what it says, at most 300 characters.

    An error that says nothing gives `otherwise`, or the name of its class.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else otherwise or type(error).__name__


def _shown(text: str) -> Iterator[str]:
    """Each character, or its escape."""
    marks = _MARKS  # nothing stands before the first one
    for character in text:
        kind = unicodedata.category(character)
        if kind in ("Mn", "Me") and not _BLANK.match(character):
            marks += 1
            yield character if marks <= _MARKS else _escape(character)
            continue
        hidden = kind in _UNSEEN or (kind == "Zs" and character != " ") or _BLANK.match(character)
        marks = _MARKS if hidden else 0
        yield _escape(character) if hidden else character


def _escape(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
