"""Text from untrusted files (ids, paths, messages), made safe to show in each place it goes to.

A latents file may be named, or name its records, by whoever wants a moderator to see something
else: terminal escape sequences, right-to-left overrides, markup, spreadsheet formulas.
"""

from __future__ import annotations

import re
import unicodedata

# Control, format (bidirectional overrides, zero-width characters), surrogate and private-use
# characters, line and paragraph separators: none of them has a look of its own.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

# What makes a spreadsheet read a cell as a formula (https://owasp.org/www-community/attacks/
# CSV_Injection), full-width forms included, at the start of a cell or after anything that some
# program's import might take for the border of one.
_FORMULA = re.compile(r"""(^|[,;|"'])(\s*)(?=[=+\-@＝＋－＠])""")


def visible(text: object, limit: int = 200) -> str:
    """`text` on one line with nothing unseen in it, the middle left out beyond `limit` characters.

    Every character without a look of its own is written as its escape (`\\x1b`, `\\u202e`), so
    that two different ids stay different to the eye.
    """
    shown = "".join(_escape(c) if unicodedata.category(c) in _UNSEEN else c for c in str(text))
    if len(shown) <= limit:
        return shown
    head = (limit - 1) // 2
    return f"{shown[:head]}…{shown[len(shown) - (limit - 1 - head) :]}"


def spreadsheet_cell(text: object, limit: int = 2000) -> str:
    """`visible` text that no spreadsheet evaluates: an apostrophe stands before formula signs."""
    return _FORMULA.sub(r"\1\2'", visible(text, limit))


def _escape(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
