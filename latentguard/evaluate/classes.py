"""Class names from a file, and which of them an image's own label means."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from latentguard.errors import ModelError
from latentguard.evaluate.lines import read_lines, read_text

SYNSET = re.compile(r"n[0-9]{8}")
"""How ImageNet names its classes: an id of WordNet."""

MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class Classes:
    """Classes in their order, which is that of their numbers.

    source: the file, for messages. names: what a model is asked for. synsets: of each, where the
    file says them. whole: each name as the file has it, with all of its synonyms.
    """

    source: str
    names: tuple[str, ...]
    synsets: tuple[str, ...] | None = None
    whole: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sha256(self) -> str:
        """Hex digest of the names."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()

    def with_synsets(self, other: Classes) -> Classes:
        """These names with the synsets of another file, which has as many classes.

        Raises ModelError where it has not, or names no synsets.
        """
        if other.synsets is None:
            raise ModelError(
                f"{other.source}: names no synsets: each line must begin with one, as in "
                "'n01440764 tench, Tinca tinca'"
            )
        if len(other) != len(self):
            raise ModelError(
                f"{other.source} has {len(other)} classes, and {self.source} has {len(self)}: the "
                "same line must mean the same class"
            )
        return replace(self, synsets=other.synsets)

    @cached_property
    def by_synset(self) -> dict[str, int]:
        """The number of each synset; empty where the file says none."""
        return {synset: number for number, synset in enumerate(self.synsets or ())}

    def named(self, text: str) -> list[int]:
        """The numbers of the classes of a name, whatever its case; "_" may stand for a space."""
        return self._by_name.get(_plain(text), [])

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, name in enumerate(self.names):
            forms = {_plain(name)} | ({_plain(self.whole[number])} if self.whole else set())
            for form in forms:
                found.setdefault(form, []).append(number)
        return found


def read_classes(path: Path) -> Classes:
    """A file of class names, of which there are three kinds.

    One name a line; a synset and its names a line (`n01440764 tench, Tinca tinca`, as Kaggle's
    LOC_synset_mapping.txt), of which the first counts; or JSON: `{"0": ["n01440764", "tench"]}`
    (imagenet_class_index.json), `{"0": "tench"}` or `["tench"]`.

    Raises ModelError, which names file and line.
    """
    if path.suffix.lower() == ".json":
        return _of_json(path)
    lines = read_names(path)
    pairs = [re.split(r"\s+", line, maxsplit=1) for line in lines]
    if not any(SYNSET.fullmatch(pair[0]) for pair in pairs):
        return Classes(str(path), tuple(lines))
    entries = []
    for number, pair in enumerate(pairs, 1):
        if len(pair) < 2 or not SYNSET.fullmatch(pair[0]):
            raise ModelError(
                f"{path}, line {number}: must be a synset and its name, as in "
                f"'n01440764 tench, Tinca tinca', got {' '.join(pair)[:40]!r}"
            )
        entries.append((pair[0], pair[1], f"line {number}"))
    return _of_entries(path, entries)


def read_names(path: Path) -> list[str]:
    """Class names, one a line. Raises ModelError for an unreadable file or an empty line."""
    names = [line.strip() for line in read_lines(path)]
    for number, name in enumerate(names, 1):
        if not name:
            raise ModelError(f"{path}, line {number}: a class name must not be empty")
    return names


def _of_json(path: Path) -> Classes:
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: is not JSON: {error}") from error
    if isinstance(values, dict):
        for number in range(len(values)):
            if str(number) not in values:
                raise ModelError(
                    f"{path}: the {len(values)} classes must be numbered from 0 on, and "
                    f'"{number}" is missing'
                )
        values = [values[str(number)] for number in range(len(values))]
    if not isinstance(values, list) or not 0 < len(values) <= MAX_CLASSES:
        raise ModelError(f"{path}: must be an object or a list of 1 to {MAX_CLASSES} classes")
    if all(isinstance(value, str) and value.strip() for value in values):
        return Classes(str(path), tuple(_spaced(value) for value in values))
    entries = [
        (*_pair(path, number, value), f'class "{number}"') for number, value in enumerate(values)
    ]
    return _of_entries(path, entries)


def _pair(path: Path, number: int, value: Any) -> tuple[str, str]:
    good = isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
    if not good or not SYNSET.fullmatch(value[0]) or not value[1].strip():
        raise ModelError(
            f'{path}, class "{number}": must be a synset and a name, as in '
            f'["n01440764", "tench"], got {json.dumps(value)[:60]}'
        )
    return value[0], value[1]


def _of_entries(path: Path, entries: Sequence[tuple[str, str, str]]) -> Classes:
    """From the synset, the names and the place of each class."""
    seen: dict[str, str] = {}
    for synset, _, where in entries:
        if synset in seen:
            raise ModelError(f"{path}, {where}: the synset {synset} stands in {seen[synset]}, too")
        seen[synset] = where
    whole = tuple(_spaced(names) for _, names, _ in entries)
    first = tuple(names.split(",")[0].strip() for names in whole)
    return Classes(str(path), first, tuple(synset for synset, _, _ in entries), whole)


def _spaced(name: str) -> str:
    return name.strip().replace("_", " ")


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").split()).casefold()
