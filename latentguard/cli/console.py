"""Standard output and error without a traceback for an odd character or a full disk."""

from __future__ import annotations

import codecs
import os
import sys

_HANDLER = "latentguard.spelled"
# What we print beyond ASCII, for consoles that lack it: code page 437, LC_ALL=C.
_SPELLED = {
    "✓": "+",
    "✕": "x",
    "↻": "~",
    "≥": ">=",
    "×": "x",
    "·": "-",
    "…": "...",
    "−": "-",
    "–": "-",
    "—": "-",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "•": "*",
}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Our own signs in ASCII; every other character as an escape, so that none is mistaken."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    spelled = "".join(
        _SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in text
    )
    return spelled, error.end


def prepare() -> None:
    """From now on, characters that a console cannot show are spelled out and raise no error."""
    codecs.register_error(_HANDLER, _spell)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook stands in for it
            stream.reconfigure(errors=_HANDLER)


def abandon() -> None:
    """Standard output is gone: flushing the rest at exit must not fail again."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # something in memory stands in for it
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
