"""Untrusted YAML to values that know their lines: bounded, tag-free, one error a defect.

Only PyYAML's event stream is used, never its constructors, so nothing in a file can name a type.
Size, nesting and the number of values (aliases counted as what they expand to) are bounded while
reading. Plain scalars follow the core schema of YAML 1.2, as editors do: `1e-3` is a number,
`yes`, `off` and `2024-01-01` are text. Policies, their locks and latent spaces of one's own are
read with it. The errors are PolicyErrors; whoever reads something else gives them its own kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from latentguard.errors import PolicyError
from latentguard.regular import open_regular, problem
from latentguard.text import visible

MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
MAX_DEPTH = 16
MAX_SHOWN_ERRORS = 5

# The same grammar in C where PyYAML was built with libyaml; a hundred times faster on long files.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Scalar = str | int | float | bool | None
Problem = tuple[int, str]

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
# Longer runs of digits fall through to the float, whose conversion is linear in their length.
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)")
_NAN = frozenset({".nan", ".NaN", ".NAN"})


@dataclass(frozen=True, slots=True)
class Node:
    """One YAML value that knows its lines.

    value: a scalar, a list of nodes, or a dict from key to node.
    line: where the value starts, counted from 1; `key_lines` has the line of each key.
    size, depth: how many values it expands to and how deep they nest, aliases included.
    """

    value: Scalar | list[Node] | dict[str, Node]
    line: int
    key_lines: Mapping[str, int] = field(default_factory=dict)
    size: int = 1
    depth: int = 0

    def plain(self) -> Any:
        """The value as Python's own dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class _Collection:
    """A list or mapping whose end has not been read yet."""

    def __init__(self, event: yaml.CollectionStartEvent) -> None:
        self.anchor: str | None = event.anchor
        self.line = _line(event)
        self.is_mapping = isinstance(event, yaml.MappingStartEvent)
        self.items: list[Node] = []
        self.entries: dict[str, Node] = {}
        self.key_lines: dict[str, int] = {}
        self.key: str | None = None
        self.key_is_duplicate = False

    @property
    def wants_key(self) -> bool:
        return self.is_mapping and self.key is None

    def add(self, node: Node) -> None:
        self.items.append(node)
        if self.key is not None:
            if not self.key_is_duplicate:
                self.entries[self.key] = node
            self.key = None

    def node(self) -> Node:
        return Node(
            value=self.entries if self.is_mapping else self.items,
            line=self.line,
            key_lines=self.key_lines,
            size=1 + sum(item.size for item in self.items),
            depth=1 + max((item.depth for item in self.items), default=0),
        )


class _Composer:
    """Events to one tree of nodes, without recursion, stopping at the first bound crossed."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.open: list[_Collection] = []
        self.anchors: dict[str, Node] = {}
        self.values = 0
        self.root: Node | None = None
        self.duplicates: list[Problem] = []

    def refuse(self, line: int, sentence: str) -> PolicyError:
        return problems_error(self.source, [(line, sentence)])

    def compose(self, events: Iterable[yaml.Event]) -> Node:
        for event in events:
            self.feed(event)
        if self.root is None:
            raise self.refuse(1, "the file is empty")
        if self.duplicates:
            raise problems_error(self.source, self.duplicates)
        return self.root

    def feed(self, event: yaml.Event) -> None:
        line = _line(event)
        if isinstance(event, yaml.DocumentStartEvent):
            if self.root is not None:
                raise self.refuse(line, "a second document starts here; a file holds one")
            return
        if isinstance(event, yaml.CollectionEndEvent):
            done = self.open.pop()
            self.finish(done.node(), done.anchor)
            return
        if not isinstance(event, yaml.NodeEvent):
            return
        wants_key = bool(self.open) and self.open[-1].wants_key
        if wants_key and not isinstance(event, yaml.ScalarEvent):
            raise self.refuse(line, "a key must be plain text")
        if isinstance(event, yaml.AliasEvent):
            self.alias(event, line)
            return
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            raise self.refuse(line, f"YAML tags are not allowed, got {show(event.tag)}")
        self.count(1, line)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self.open) >= MAX_DEPTH:
                raise self.refuse(line, f"nesting is deeper than {MAX_DEPTH} levels")
            self.open.append(_Collection(event))
        elif isinstance(event, yaml.ScalarEvent):
            if wants_key:
                self.start_entry(event.value, line)
            else:
                self.finish(Node(_resolve(event), line), event.anchor)

    def start_entry(self, key: str, line: int) -> None:
        mapping = self.open[-1]
        mapping.key = key
        mapping.key_is_duplicate = key in mapping.entries
        if mapping.key_is_duplicate:
            first = mapping.key_lines[key]
            self.duplicates.append(
                (line, f"key {show(key)} stands twice in one mapping, first in line {first}")
            )
        else:
            mapping.key_lines[key] = line

    def alias(self, event: yaml.AliasEvent, line: int) -> None:
        name = event.anchor or ""
        node = self.anchors.get(name)
        if node is None:
            raise self.refuse(
                line, f"alias *{clip(name)} has no complete anchor of that name before it"
            )
        self.count(node.size, line)
        if len(self.open) + node.depth > MAX_DEPTH:
            raise self.refuse(line, f"nesting is deeper than {MAX_DEPTH} levels by an alias")
        self.finish(node, None)

    def count(self, values: int, line: int) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise self.refuse(
                line, f"the file holds more than {MAX_VALUES:,} values, aliases expanded"
            )

    def finish(self, node: Node, anchor: str | None) -> None:
        if anchor is not None:
            self.anchors[anchor] = node
        if self.open:
            self.open[-1].add(node)
        else:
            self.root = node


def _line(event: yaml.Event) -> int:
    mark = event.start_mark
    return mark.line + 1 if mark else 1


def _resolve(event: yaml.ScalarEvent) -> Scalar:
    text: str = event.value
    if not event.implicit[0]:  # quoted, or a block scalar
        return text
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) or text in _NAN:
        return float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)
    return text


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file of at most 1 MiB. Raises PolicyError."""
    try:
        with open_regular(path) as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise PolicyError(f"{path}: there is no such file") from error
    except OSError as error:
        if os.path.isdir(path):
            raise PolicyError(f"{path}: is a folder, not a file") from error
        raise PolicyError(f"{clip(str(path))}: {problem(error)}") from error


def compose(data: bytes, source: str) -> Node:
    """The one YAML document in `data` as nodes that know their lines.

    source: the file's name, for messages.
    Raises PolicyError for more than 1 MiB, text that is not UTF-8, invalid YAML, tags, duplicate
    keys, nesting beyond MAX_DEPTH, and more than MAX_VALUES values after alias expansion.
    """
    if len(data) > MAX_BYTES:
        raise PolicyError(f"{source}: the file is larger than 1 MiB ({MAX_BYTES:,} bytes)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise problems_error(source, [(line, f"the file is not UTF-8: {error.reason}")]) from error
    composer = _Composer(source)
    forbidden = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if forbidden:
        line = text.count("\n", 0, forbidden.start()) + 1
        raise composer.refuse(line, f"the file holds {forbidden.group()!r}, which YAML forbids")
    try:
        return composer.compose(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = error.problem or error.context or "unreadable"
        raise composer.refuse(line, f"this is not valid YAML: {clip(reason, 200)}") from error
    except PolicyError:
        raise
    # The scanner also lets errors of int() and chr() through, for escapes such as "\UFFFFFFFF".
    except Exception as error:
        raise PolicyError(f"{source}: this is not valid YAML: {clip(str(error), 200)}") from error


def line_of(node: Node, loc: Sequence[int | str]) -> int:
    """The line of what `loc` leads to, or of the deepest part of the way that exists."""
    line = node.line
    for step in loc:
        value = node.value
        if isinstance(value, dict) and step in value:
            line, node = node.key_lines[str(step)], value[str(step)]
        elif isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value):
            node = value[step]
            line = node.line
        else:
            break
    return line


def problems_error(source: str, problems: Sequence[Problem]) -> PolicyError:
    """One PolicyError for all problems: the message shows the first few, `.errors` has all."""
    sentences = [f"{source}:{line}: {sentence}" for line, sentence in sorted(set(problems))]
    shown = sentences[:MAX_SHOWN_ERRORS]
    if len(sentences) > len(shown):
        shown.append(f"... and {len(sentences) - len(shown)} more")
    return PolicyError("\n".join(shown), errors=sentences)


def clip(text: str, limit: int = 60) -> str:
    """`text` shortened for a message, with what could upset a terminal escaped."""
    clipped = text if len(text) <= limit else text[: limit - 3] + "..."
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in clipped)
    return visible(escaped, 12 * max(limit, 1))


def show(value: object) -> str:
    """A value as a message quotes it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return f"'{clip(value)}'"
        case int() | float():
            return clip(repr(value))
        case Mapping():
            return "a mapping"
        case list() | tuple():
            short = len(value) <= 4 and not any(isinstance(v, list | Mapping) for v in value)
            return f"[{', '.join(map(show, value))}]" if short else "a list"
        case _:
            return clip(repr(value))
