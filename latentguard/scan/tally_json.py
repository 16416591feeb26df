"""The parts of a tally as JSON, and back.

Reading is strict and bounded, since a tally may come from whoever ran a shard.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from latentguard.judge import PolicyId
from latentguard.judge.verdict import ACTIONS
from latentguard.scan.bins import MARGINS, PROBABILITIES, Bins, Histogram
from latentguard.scan.category_counts import MAX_CLAUSE, CategoryCount, CategoryCounts, Scheme
from latentguard.scan.concept_tally import (
    MAX_EXAMPLES,
    MAX_ID,
    MAX_NOTES,
    MAX_SOURCE,
    ConceptTally,
    Example,
    Judge,
    JudgeTally,
)
from latentguard.scan.error_kinds import MAX_KINDS, MAX_TEXT, ErrorKind, ErrorKinds, Where

_MAX_NAME = 4000
_MAX_JUDGES = 64
_MAX_CONCEPTS = 10_000
_MAX_PROMPTS = 10_000
_MAX_SCHEMES = 64
_MAX_CATEGORIES = 1000
_MAX_PREVIEW = 8192
_MAX_COUNT = 1 << 52
_PNG = b"\x89PNG\r\n\x1a\n"

_Value = TypeVar("_Value")
_ImageList = list[tuple[str, int, str | None, bytes | None]]


# -- writing ---------------------------------------------------------------------------------


class _Images:
    """Images that are examples, each written once however many concepts name it."""

    def __init__(self) -> None:
        self.listed: list[list[Any]] = []
        self._places: dict[tuple[str, int, str | None, bytes | None], int] = {}

    def place(self, example: Example) -> int:
        key = (example.source, example.place, example.id, example.preview)
        if key not in self._places:
            self._places[key] = len(self.listed)
            png = example.preview
            preview = None if png is None else base64.b64encode(png).decode("ascii")
            self.listed.append([example.source, example.place, example.id, preview])
        return self._places[key]


def counts_to_json(counter: Counter[str]) -> dict[str, int]:
    return {key: count for key, count in sorted(counter.items()) if count}


def errors_to_json(errors: ErrorKinds) -> dict[str, Any]:
    kinds = sorted(errors.kinds.items())
    listed = [[text, kind.count, *kind.example] for text, kind in kinds]
    return {"kinds": listed, "others": errors.others}


def categories_to_json(counts: CategoryCounts) -> list[dict[str, Any]]:
    return [
        {
            "scheme": scheme.name,
            "version": scheme.version,
            "categories": [
                [category, count.name, count.flagged, count.unscored, count.clause]
                for category, count in sorted(found.items())
            ],
        }
        for scheme, found in sorted(counts.schemes.items())
    ]


def judges_to_json(judges: Mapping[Judge, JudgeTally]) -> tuple[list[Any], list[Any]]:
    """The judges, and the images that their examples name by place."""
    images = _Images()
    return [_judge_dict(key, judge, images) for key, judge in sorted(judges.items())], images.listed


def _judge_dict(key: Judge, judge: JudgeTally, images: _Images) -> dict[str, Any]:
    return {
        "model": key.model.to_dict(),
        "space": key.space,
        "images": judge.images,
        "notes": judge.notes,
        "unseen_contrast": sorted(judge.unseen_contrast),
        "concepts": [
            _concept_dict(name, concept, images) for name, concept in sorted(judge.concepts.items())
        ],
    }


def _concept_dict(name: str, concept: ConceptTally, images: _Images) -> dict[str, Any]:
    return {
        "id": name,
        "category": concept.category,
        "action": concept.action,
        "threshold": concept.threshold,
        "judged": concept.judged,
        "matched": concept.matched,
        "unchecked": concept.unchecked,
        "highest": concept.highest if concept.judged else None,
        "lowest": concept.lowest if concept.judged else None,
        "margins": concept.margins.to_dict(),
        "probabilities": concept.probabilities.to_dict(),
        "unseen": sorted(concept.unseen),
        "gravest": [
            [example.margin, example.probability, images.place(example)]
            for example in concept.gravest
        ],
    }


# -- reading ---------------------------------------------------------------------------------


class Reader:
    """An object with certain keys and no others; errors say where a value is wrong."""

    def __init__(self, data: Any, name: str, keys: tuple[str, ...]) -> None:
        if not isinstance(data, Mapping):
            raise ValueError(f"{name}: must be an object, got {type(data).__name__}")
        if missing := [key for key in keys if key not in data]:
            raise ValueError(f"{name}: {missing[0]} is missing")
        if more := sorted(map(str, data.keys() - set(keys))):
            raise ValueError(f"{name}: there is no key {more[0][:_MAX_NAME]!r}")
        self._data, self._name = data, name

    def value(self, key: str, read: Callable[[Any], _Value]) -> _Value:
        try:
            return read(self._data[key])
        except ValueError as error:
            raise ValueError(f"{self._name}: {key}: {error}") from None

    def optional(self, key: str, read: Callable[[Any], _Value]) -> _Value | None:
        return None if self._data[key] is None else self.value(key, read)


def whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"must be a whole number, got {str(value)[:80]}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {str(value)[:80]}")
    return float(value) + 0.0


def _text(most: int) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise ValueError(f"must be text of at most {most} characters")
        return value

    return read


def _listed(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"must be a list of at most {most}")
    return value


def _row(value: Any, length: int) -> list[Any]:
    if len(_listed(value, length)) != length:
        raise ValueError(f"must hold lists of {length} values")
    return list(value)


def counts_of(keys: tuple[str, ...], value: Any) -> Counter[str]:
    if not isinstance(value, Mapping) or not set(value) <= set(keys):
        raise ValueError(f"must be counts of {', '.join(keys)}")
    return +Counter({key: whole(count) for key, count in value.items()})


def policy_of(value: Any) -> PolicyId:
    read = Reader(value, "policy", ("name", "version", "sha256"))
    text = _text(_MAX_NAME)
    return PolicyId(*(read.value(key, text) for key in ("name", "version", "sha256")))


def errors_of(value: Any) -> ErrorKinds:
    read = Reader(value, "errors", ("kinds", "others"))
    errors = ErrorKinds()
    errors.others = read.value("others", whole)
    for item in read.value("kinds", lambda found: _listed(found, MAX_KINDS)):
        kind, count, source, index, error = _row(item, 5)
        where = Where(_text(MAX_SOURCE)(source), _place(index), _text(MAX_TEXT)(error))
        errors.kinds[_text(MAX_TEXT)(kind)] = ErrorKind(whole(count), where)
    return errors


def categories_of(value: Any) -> CategoryCounts:
    counts, text = CategoryCounts(), _text(_MAX_NAME)
    for item in _listed(value, _MAX_SCHEMES):
        read = Reader(item, "scheme", ("scheme", "version", "categories"))
        scheme = Scheme(read.value("scheme", text), read.value("version", text))
        if scheme in counts.schemes:
            raise ValueError(f"{scheme.name} {scheme.version} is there twice")
        found = counts.schemes[scheme] = {}
        for row in read.value("categories", lambda found: _listed(found, _MAX_CATEGORIES)):
            category, name, flagged, unscored, clause = _row(row, 5)
            found[text(category)] = CategoryCount(
                text(name), whole(flagged), whole(unscored), _text(MAX_CLAUSE)(clause)
            )
    return counts


def _place(value: Any) -> int:
    return value if value == -1 and type(value) is int else whole(value)


def images_of(value: Any) -> _ImageList:
    images: _ImageList = []
    for item in _listed(value, _MAX_JUDGES * _MAX_CONCEPTS):
        source, index, name, preview = _row(item, 4)
        images.append(
            (
                _text(MAX_SOURCE)(source),
                _place(index),
                None if name is None else _text(MAX_ID)(name),
                None if preview is None else _png(preview),
            )
        )
    return images


def _png(value: Any) -> bytes:
    text = _text(2 * _MAX_PREVIEW)(value)
    try:
        png = base64.b64decode(text, validate=True)
    except binascii.Error:
        png = b""
    if not png.startswith(_PNG) or len(png) > _MAX_PREVIEW:
        raise ValueError(f"a preview must be a PNG of at most {_MAX_PREVIEW} bytes in base64")
    return png


def judges_of(images: _ImageList, value: Any) -> dict[Judge, JudgeTally]:
    judges: dict[Judge, JudgeTally] = {}
    text = _text(_MAX_NAME)
    for item in _listed(value, _MAX_JUDGES):
        keys = ("model", "space", "images", "notes", "unseen_contrast", "concepts")
        read = Reader(item, "judge", keys)
        model = read.value("model", lambda found: Reader(found, "model", ("name", "sha256")))
        name, digest = model.value("name", text), model.value("sha256", text)
        key = Judge(name, digest, read.value("space", text))
        if key in judges:
            raise ValueError(f"model {name} is there twice")
        judges[key] = JudgeTally(
            read.value("images", whole),
            read.value("notes", _text(MAX_NOTES)),
            read.value("unseen_contrast", _prompts),
            read.value("concepts", lambda found: _concepts(found, images)),
        )
    return judges


def _prompts(value: Any) -> frozenset[str]:
    return frozenset(map(_text(_MAX_NAME), _listed(value, _MAX_PROMPTS)))


def _concepts(value: Any, images: _ImageList) -> dict[str, ConceptTally]:
    concepts: dict[str, ConceptTally] = {}
    for item in _listed(value, _MAX_CONCEPTS):
        name, concept = _concept(item, images)
        if name in concepts:
            raise ValueError(f"concept {name} is there twice")
        concepts[name] = concept
    return concepts


_CONCEPT_KEYS = (
    "id",
    "category",
    "action",
    "threshold",
    "judged",
    "matched",
    "unchecked",
    "highest",
    "lowest",
    "margins",
    "probabilities",
    "unseen",
    "gravest",
)


def _concept(item: Any, images: _ImageList) -> tuple[str, ConceptTally]:
    read = Reader(item, "concept", _CONCEPT_KEYS)
    text = _text(_MAX_NAME)
    action = read.value("action", text)
    if action not in ACTIONS:
        raise ValueError(f"action must be one of {', '.join(ACTIONS)}, got {action!r}")
    concept = ConceptTally(
        category=read.value("category", text),
        action=action,
        threshold=read.value("threshold", _threshold),
        judged=read.value("judged", whole),
        matched=read.value("matched", whole),
        unchecked=read.value("unchecked", whole),
        margins=read.value("margins", lambda found: _histogram(found, MARGINS)),
        probabilities=read.value("probabilities", lambda found: _histogram(found, PROBABILITIES)),
        unseen=read.value("unseen", _prompts),
        gravest=read.value("gravest", lambda found: _gravest(found, images)),
    )
    if concept.judged:
        concept.highest = read.value("highest", _number)
        concept.lowest = read.value("lowest", _number)
    totals = {concept.judged, concept.margins.total, concept.probabilities.total}
    if len(totals) > 1 or concept.matched > concept.judged:
        raise ValueError("the counts of a concept contradict each other")
    return read.value("id", text), concept


def _threshold(value: Any) -> dict[str, str | float]:
    if not isinstance(value, Mapping):
        raise ValueError("must be an object")
    keys = ("kind", "value", "margin") if "margin" in value else ("kind", "value")
    read = Reader(value, "threshold", keys)
    kind = read.value("kind", _text(20))
    if kind not in ("probability", "margin", "fpr"):
        raise ValueError(f"kind must be probability, margin or fpr, got {kind!r}")
    return {"kind": kind, **{key: read.value(key, _number) for key in keys[1:]}}


def _histogram(value: Any, bins: Bins) -> Histogram:
    read = Reader(value, "histogram", ("first", "counts"))
    counts = read.value("counts", lambda found: list(map(whole, _listed(found, len(bins)))))
    return Histogram.of(bins, read.value("first", whole), counts)


def _gravest(value: Any, images: _ImageList) -> list[Example]:
    found = []
    for item in _listed(value, MAX_EXAMPLES):
        margin, probability, place = _row(item, 3)
        if whole(place) >= len(images):
            raise ValueError(f"there is no image {place}")
        found.append(Example(_number(margin), _number(probability), *images[place]))
    return found
