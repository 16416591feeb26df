"""Small JSON and YAML files to plain values, with the line of each key for messages.

No tag, no object, no key that stands twice, no unbounded size: such a file may come from anywhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from latentguard.errors import LatentsError
from latentguard.regular import open_regular, problem
from latentguard.text import visible

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 8

Keys = tuple[str | int, ...]
"""The way to a value: the keys of mappings and the indices of lists."""

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")
_WORDS = {"null": None, "~": None, "": None, "true": True, "false": False}
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "value", "merge")
)


def read_text(path: Path) -> str:
    """The text of a regular file of at most 1 MiB. Raises LatentsError."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise LatentsError(f"{path}: there is no such file") from error
    except OSError as error:
        raise LatentsError(f"{path}: {problem(error)}") from error
    if len(data) > MAX_BYTES:
        raise LatentsError(f"{path}: is larger than 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LatentsError(f"{path}: is not UTF-8") from error


def parse(text: str, source: str) -> Any:
    """The plain value of a JSON or YAML text, told by the ending of `source`. Raises LatentsError
    with the line."""
    if source.lower().endswith(".json"):
        return _parse_json(text, source)
    return _Reader(source).value(_composed(text, source), 0)


def line_of(text: str, keys: Keys) -> int | None:
    """The line of a value, or of the last mapping or list on the way to it; None if unknown."""
    import yaml

    try:
        node = yaml.compose(text, Loader=_loader())
    except Exception:  # JSON that is no YAML; a message without a line is still a message
        return None
    line = None
    for key in (*keys, None):
        if node is None:
            break
        line = node.start_mark.line + 1 if line is None or not keys else line
        found: Any = None
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.value == key:
                    line, found = name.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            found = node.value[key]
            line = found.start_mark.line + 1
        node = found
    return line


def _parse_json(text: str, source: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LatentsError(f"{source}: key {twice!r:.60} stands twice in one mapping")
        return found

    def refuse(name: str) -> Any:
        raise LatentsError(f"{source}: {name} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise LatentsError(f"{source}:{error.lineno}: is not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise LatentsError(f"{source}: is nested too deeply") from error


def _loader() -> Any:
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _composed(text: str, source: str) -> Any:
    import yaml

    try:
        node = yaml.compose(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = visible(error.problem or "unreadable", 200)
        raise LatentsError(f"{source}:{line}: is not valid YAML: {reason}") from error
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise LatentsError(f"{source}: is not valid YAML") from error
    if node is None:
        raise LatentsError(f"{source}: the file is empty")
    return node


class _Reader:
    """YAML nodes to plain values; bounded, aliases counted as what they expand to."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._count = 0

    def value(self, node: Any, depth: int) -> Any:
        import yaml

        self._count += 1
        if self._count > MAX_VALUES or depth > MAX_DEPTH:
            raise self._refused(node, "holds too many values, or nests them too deeply")
        if node.tag not in _TAGS:
            raise self._refused(node, f"YAML tags are not allowed, got {visible(node.tag, 60)!r}")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            return node.value if node.style else _scalar(node.value)
        found: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._refused(key, "a key must be plain text")
            if key.value in found:
                raise self._refused(key, f"key {key.value!r:.60} stands twice in one mapping")
            found[key.value] = self.value(item, depth + 1)
        return found

    def _refused(self, node: Any, sentence: str) -> LatentsError:
        return LatentsError(f"{self._source}:{node.start_mark.line + 1}: {sentence}")


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text
