"""What a verdict says in the words of a published hazard scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Categories:
    """One image in the categories of one scheme.

    scheme, version: which one. names: what people call each category, by its id.
    flagged: the ids of those of which a concept matched, whatever its action.
    scores: the largest probability of each category's concepts that were judged; None where none
        was, which is no 0.
    unchecked: for each category that was not checked, or not all of it, one clause that says why.
    severities: the scheme's level of each category, None where none of its concepts was judged;
        None as a whole where the scheme has no levels.
    """

    scheme: str
    version: str
    names: Mapping[str, str]
    flagged: tuple[str, ...]
    scores: Mapping[str, float | None]
    unchecked: Mapping[str, str]
    severities: Mapping[str, int | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-able data, without the scheme's name."""
        data: dict[str, Any] = {
            "version": self.version,
            "names": dict(self.names),
            "flagged": list(self.flagged),
            "scores": dict(self.scores),
            "unchecked": dict(self.unchecked),
        }
        if self.severities is not None:
            data["severities"] = dict(self.severities)
        return data

    @classmethod
    def from_dict(cls, scheme: str, data: Any) -> Categories:
        """What `to_dict` gave. Raises ValueError for anything else."""
        try:
            found = cls(
                scheme=scheme,
                version=data["version"],
                names=dict(data["names"]),
                flagged=tuple(data["flagged"]),
                scores={name: _score(score) for name, score in data["scores"].items()},
                unchecked=dict(data["unchecked"]),
                severities=None if data.get("severities") is None else dict(data["severities"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"verdict: taxonomies: '{scheme}' cannot be read: {error}") from error
        levels = found.severities or {}
        if not set(found.flagged) <= set(found.scores) == set(found.names) or set(levels) - set(
            found.scores
        ):
            raise ValueError(f"verdict: taxonomies: the categories of '{scheme}' do not fit")
        return found


def _score(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"a score must be a number, got {value!r}")
    return float(value)
