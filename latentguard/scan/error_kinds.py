"""The errors of a scan, as a bounded number of kinds with a count and one example each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MAX_KINDS = 64
MAX_TEXT = 300

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_NUMBER = re.compile(r"\d+(?:[.,x]\d+)*")


class Where(NamedTuple):
    """One image that had an error, and what the error said in full."""

    source: str
    place: int
    error: str


@dataclass(frozen=True)
class ErrorKind:
    """How often an error of a kind occurred, and its first image, by source and place."""

    count: int
    example: Where

    def __add__(self, other: ErrorKind) -> ErrorKind:
        return ErrorKind(self.count + other.count, min(self.example, other.example))


def kind_of(error: str) -> str:
    """An error without the parts that differ from file to file: quoted names and numbers."""
    return _NUMBER.sub("#", _QUOTED.sub("'…'", shortened(error, 2 * MAX_TEXT)))[:MAX_TEXT]


def shortened(text: str, most: int) -> str:
    """At most `most` characters; the middle is left out."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


class ErrorKinds:
    """Counts of errors by kind; `others` counts those of kinds beyond the first `MAX_KINDS`.

    First in the order of their hashes: a kind that is among them for a whole run is among them for
    each of its shards, so that counts are exact in whatever order shards are merged.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, ErrorKind] = {}
        self.others = 0

    def add(self, error: str, source: str, index: int) -> None:
        """Count one image's error."""
        where = Where(source, index, shortened(error, MAX_TEXT))
        self._count(kind_of(error), ErrorKind(1, where))
        self._bound()

    def merge(self, other: ErrorKinds) -> None:
        """Count what another has counted."""
        self.others += other.others
        for text, kind in other.kinds.items():
            self._count(text, kind)
        self._bound()

    @property
    def total(self) -> int:
        return self.others + sum(kind.count for kind in self.kinds.values())

    def by_count(self) -> Iterator[tuple[str, ErrorKind]]:
        """The most frequent kind first."""
        yield from sorted(self.kinds.items(), key=lambda item: (-item[1].count, item[0]))

    def _count(self, text: str, kind: ErrorKind) -> None:
        known = self.kinds.get(text)
        self.kinds[text] = kind if known is None else known + kind

    def _bound(self) -> None:
        while len(self.kinds) > MAX_KINDS:
            self.others += self.kinds.pop(max(self.kinds, key=_order)).count


def _order(kind: str) -> bytes:
    return hashlib.blake2b(kind.encode("utf-8", "surrogatepass"), digest_size=16).digest()
