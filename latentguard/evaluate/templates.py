"""Texts around a class name, as files have them: CLIP's lists, or one a line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from latentguard.errors import ModelError
from latentguard.evaluate.lines import read_lines

_FRAME = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_]*\s*=\s*)?[\[(]|[\])],?")
"""The first and the last line of a Python list."""
_QUOTED = re.compile(r"""(?:lambda\s+\w+\s*:\s*)?f?(["'])(?P<text>.*)\1,?""")
_PLACE = re.compile(r"\{[A-Za-z_]*\}")


def read_templates(path: Path) -> tuple[str, ...]:
    """Templates, one a line, each with one "{}" for the class name.

    `{c}` and other names count as "{}", and a line may be an item of a Python list, as
    `lambda c: f'a bad photo of a {c}.',` in the lists of CLIP and open_clip. Blank lines and those
    that begin with # do not count.

    Raises ModelError, which names file and line.
    """
    found = []
    for number, line in enumerate(read_lines(path), 1):
        text = line.strip()
        if not text or text.startswith("#") or _FRAME.fullmatch(text):
            continue
        quoted = _QUOTED.fullmatch(text)
        template = with_place(text if quoted is None else quoted["text"])
        if template is None:
            raise ModelError(
                f"{path}, line {number}: a template must have one {{}} (or {{c}}) for the class "
                f"name, got {text[:60]!r}"
            )
        found.append(template)
    if not found:
        raise ModelError(f"{path}: has no template")
    return tuple(found)


def with_place(text: str) -> str | None:
    """A template with its one place for a name as "{}"; None where it has not just one."""
    plain, count = _PLACE.subn("{}", text)
    return plain if count == 1 and plain.count("{") == plain.count("}") == 1 else None


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError for one without just one "{}", and for none at all."""
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template must have one {{}} for the class name, got {template!r}")
    if not templates:
        raise ValueError("templates must not be empty")
