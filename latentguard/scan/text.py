"""Text from untrusted files in the cells of a spreadsheet."""

from __future__ import annotations

import re

from latentguard.text import visible

__all__ = ["spreadsheet_cell", "visible"]

# What makes a spreadsheet read a cell as a formula (https://owasp.org/www-community/attacks/
# CSV_Injection), full-width forms included, at the start of a cell or after anything that some
# program's import might take for the border of one.
_FORMULA = re.compile(r"""(^|[,;|"'])(\s*)(?=[=+\-@＝＋－＠])""")


def spreadsheet_cell(text: object, limit: int = 2000) -> str:
    """`visible` text that no spreadsheet evaluates: an apostrophe stands before formula signs."""
    return _FORMULA.sub(r"\1\2'", visible(text, limit))
