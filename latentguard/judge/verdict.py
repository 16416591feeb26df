"""Verdict: the decision on one image, and the reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentguard.deprecated import Former
from latentguard.judge.categories import Categories
from latentguard.judge.model_id import ModelId

SCHEMA_VERSION = 1

DECISIONS = ("allow", "review", "steer", "block")
"""From the mildest to the strictest."""
ACTIONS = {"observe": "allow", "review": "review", "steer": "steer", "block": "block"}
"""What a policy asks for where a concept matches, and the decision that it makes; from the mildest
to the strictest."""
SEVERITIES = ("low", "medium", "high", "critical")


@dataclass(frozen=True)
class ConceptScore:
    """The scores of one concept on one image.

    margin: best cosine over the concept's prompts minus the best over its contrast prompts.
    probability: sigmoid(logit scale x margin).
    threshold: {"kind", "value"}; with the kind fpr also {"margin"}, the calibrated margin in use.
    prompt: the prompt that matched best.
    covered: whether the model can see the concept at all.
    judged: whether this noise level is in the concept's window.
    matched: covered, judged, and at or above the threshold.
    unseen: the concept's prompts that the model cannot see, which were therefore not checked;
        records of former versions do not have this.
    """

    id: str
    category: str
    action: str
    margin: float
    probability: float
    threshold: dict[str, str | float]
    prompt: str
    covered: bool
    judged: bool
    matched: bool
    unseen: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """What the threshold is compared with: `probability`, or `margin` (a difference of
        cosines)."""
        return "probability" if self.threshold["kind"] == "probability" else "margin"

    @property
    def score(self) -> float:
        """The score in the unit of the threshold."""
        return self.probability if self.unit == "probability" else self.margin

    @property
    def threshold_value(self) -> float:
        """The threshold in the same unit; NaN if none could be resolved."""
        key = "margin" if self.threshold["kind"] == "fpr" else "value"
        return float(self.threshold.get(key, math.nan))

    limit = Former("threshold_value")

    @property
    def gap(self) -> float:
        """How far the score is above the threshold; NaN if that is unknown."""
        return self.score - self.threshold_value


@dataclass(frozen=True)
class Verdict:
    """The decision on one image.

    decision: allow, review, steer or block. reason: one sentence. error: why the image could not be
    judged, or None. noise_level: noise-to-signal ratio; 0 is clean, inf means infinite or unknown
    (null in JSON). concepts: every concept that could be scored, matched or not. model: the encoder
    that scored the image, None if none did or none was named. taxonomies: the verdict in the
    categories of published hazard schemes, if that was asked for.
    """

    schema_version: int
    decision: str
    reason: str
    error: str | None
    noise_level: float
    concepts: tuple[ConceptScore, ...]
    model: ModelId | None = None
    taxonomies: tuple[Categories, ...] = ()

    @property
    def matched(self) -> tuple[ConceptScore, ...]:
        """The concepts that matched, `observe` included."""
        return tuple(concept for concept in self.concepts if concept.matched)

    def at_least(self, decision: str) -> bool:
        """Whether the decision is `decision` or a stricter one."""
        return DECISIONS.index(self.decision) >= DECISIONS.index(decision)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON-able data."""
        data = dict(vars(self))
        del data["taxonomies"]
        if self.taxonomies:
            data["taxonomies"] = {found.scheme: found.to_dict() for found in self.taxonomies}
        data["noise_level"] = self.noise_level if math.isfinite(self.noise_level) else None
        # Field by field: a scan writes millions of them, and dataclasses.asdict takes five times
        # as long.
        data["concepts"] = [
            {**vars(one), "threshold": dict(one.threshold), "unseen": list(one.unseen)}
            for one in self.concepts
        ]
        data["model"] = None if self.model is None else self.model.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The verdict from what `to_dict` returned. Other keys, as in a scan's records, are
        ignored.

        Raises ValueError for an unknown schema_version and for missing or ill-typed values.
        """
        version = data.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ValueError(f"verdict: schema_version must be {SCHEMA_VERSION}, got {version!r}")
        noise_level = _read(data, "noise_level", float, or_none=True)
        decision = _read(data, "decision", str)
        if decision not in DECISIONS:
            raise ValueError(
                f"verdict: decision must be one of {', '.join(DECISIONS)}, got {decision!r}"
            )
        return cls(
            schema_version=version,
            decision=decision,
            reason=_read(data, "reason", str),
            error=_read(data, "error", str, or_none=True),
            noise_level=math.inf if noise_level is None else noise_level,
            concepts=tuple(_read_concept(item) for item in _read(data, "concepts", list)),
            model=_read_model(data),
            taxonomies=tuple(
                Categories.from_dict(scheme, found)
                for scheme, found in _read_mapping(data, "taxonomies").items()
            ),
        )


def listed(names: Sequence[str], most: int = 3) -> str:
    """A few names in quotes, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _read(data: Mapping[str, Any], key: str, kind: type, *, or_none: bool = False) -> Any:
    if key not in data:
        raise ValueError(f"verdict: {key} is missing")
    value = data[key]
    if or_none and value is None:
        return None
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is float or not isinstance(value, kind):
        raise ValueError(f"verdict: {key} must be of type {kind.__name__}, got {value!r}")
    return value


def _read_mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What may be missing."""
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"verdict: {key} must be a mapping, got {value!r}")
    return value


def _read_model(data: Mapping[str, Any]) -> ModelId | None:
    item = data.get("model")
    if item is None:
        return None
    if isinstance(item, Mapping):
        return ModelId(_read(item, "name", str), _read(item, "sha256", str))
    # As in audit logs.
    return ModelId(_read(data, "model", str), _read(data, "model_sha256", str))


def _read_concept(item: Any) -> ConceptScore:
    if not isinstance(item, Mapping):
        raise ValueError(f"verdict: concepts must hold mappings, got {item!r}")
    threshold = _read(item, "threshold", dict)
    stated = {"kind": _read(threshold, "kind", str), "value": _read(threshold, "value", float)}
    if "margin" in threshold:
        stated["margin"] = _read(threshold, "margin", float)
    return ConceptScore(
        id=_read(item, "id", str),
        category=_read(item, "category", str),
        action=_read(item, "action", str),
        margin=_read(item, "margin", float),
        probability=_read(item, "probability", float),
        threshold=stated,
        prompt=_read(item, "prompt", str),
        covered=_read(item, "covered", bool),
        judged=_read(item, "judged", bool),
        matched=_read(item, "matched", bool),
        unseen=_read_unseen(item),
    )


def _read_unseen(item: Mapping[str, Any]) -> tuple[str, ...]:
    prompts = item.get("unseen", ())
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"verdict: unseen must be a list of prompts, got {prompts!r}")
    return tuple(prompts)
