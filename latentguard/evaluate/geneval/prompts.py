"""The benchmark's prompts: evaluation_metadata.jsonl, a JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentguard.errors import UsageError
from latentguard.regular import problem, read_bounded

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
RELATIONS = ("left of", "right of", "above", "below")

MAX_BYTES = 64 << 20
MAX_COUNT = 100


@dataclass(frozen=True)
class Wanted:
    """Objects of one class that an image must have, or must not.

    count: at least so many. color: of each of them. position: a relation, and the index of the
    wanted objects before this one that it is to.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Prompt:
    """One line: a prompt, what its image must have (`include`) and must not have (`exclude`).

    line: as it stands in the file.
    """

    tag: str
    text: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...]
    line: str


def read_prompts(path: Path) -> tuple[list[Prompt], str]:
    """The prompts of a file, and the hex digest of its bytes.

    Raises UsageError for a file that cannot be read, and a line of another form.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: {problem(error)}") from error
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8: {error.reason}") from error
    found = [
        parse(line.strip(), f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise UsageError(f"{path}: has no prompts")
    return found, hashlib.sha256(data).hexdigest()


def parse(line: str, where: str) -> Prompt:
    """One line. Raises UsageError, which begins with `where`."""
    try:
        values = json.loads(line)
        tag, text = values["tag"], values["prompt"]
        if tag not in TAGS:
            raise ValueError(f"the tag must be one of {', '.join(TAGS)}, got {tag!r}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the prompt must not be empty")
        include = tuple(_wanted(one, index) for index, one in enumerate(values["include"]))
        exclude = tuple(_wanted(one, 0) for one in values.get("exclude", ()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{where}: is no line of GenEval's metadata: {said}") from error
    return Prompt(tag, text, include, exclude, line)


def _wanted(values: Mapping[str, Any], index: int) -> Wanted:
    name, count, color = values["class"], values["count"], values.get("color")
    if not isinstance(name, str) or not name:
        raise ValueError(f"a class must be a name, got {name!r}")
    if type(count) is not int or not 1 <= count <= MAX_COUNT:
        raise ValueError(f"a count must be 1 to {MAX_COUNT}, got {count!r}")
    if color is not None and color not in COLORS:
        raise ValueError(f"a color must be one of {', '.join(COLORS)}, got {color!r}")
    position = values.get("position")
    if position is None:
        return Wanted(name, count, color)
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"a relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
    if type(target) is not int or not 0 <= target < index:
        raise ValueError(f"a position must be to an object before its own, got {target!r}")
    return Wanted(name, count, color, (relation, target))
