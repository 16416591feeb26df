"""A published hazard scheme, as it travels with a policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from latentguard.judge.verdict import SEVERITIES

MAX_CATEGORIES = 1000


@dataclass(frozen=True)
class Scheme:
    """A scheme into whose categories concepts are mapped.

    severities: its level for each severity of a concept, None where it has no levels.
    categories: the name of each by its id. parents: the id of the one that holds it, for each that
    has one.
    """

    name: str
    title: str
    version: str
    source: str
    severities: Mapping[str, int] | None
    categories: Mapping[str, str]
    parents: Mapping[str, str]

    @classmethod
    def of(cls, name: str, plain: Mapping[str, Any]) -> Scheme:
        """Read a scheme of `Policy.to_dict()["taxonomies"]`. Raises ValueError for what is none."""
        levels = plain.get("severities")
        if levels is not None and (
            set(levels) != set(SEVERITIES)
            or any(type(level) is not int for level in levels.values())
        ):
            raise ValueError(f"taxonomy '{name}' has no level for each severity")
        categories: dict[str, str] = {}
        parents: dict[str, str] = {}
        if len(plain["categories"]) > MAX_CATEGORIES:
            raise ValueError(f"taxonomy '{name}' has more than {MAX_CATEGORIES:,} categories")
        for item in plain["categories"]:
            category, parent = str(item["id"]), item.get("parent")
            if category in categories:
                raise ValueError(f"taxonomy '{name}' has the category '{category}' twice")
            if parent is not None:
                # Each stands after its parent, so that no way upward is a circle.
                if parent not in categories:
                    raise ValueError(f"taxonomy '{name}' has no '{parent}' before '{category}'")
                parents[category] = parent
            categories[category] = str(item["name"])
        return cls(
            name=name,
            title=str(plain["title"]),
            version=str(plain["version"]),
            source=str(plain["source"]),
            severities=levels,
            categories=categories,
            parents=parents,
        )

    def all_above(self, categories: Iterable[str]) -> frozenset[str]:
        """Categories, and all that hold them."""
        found: set[str] = set()
        for category in categories:
            above: str | None = category
            while above is not None and above not in found:
                found.add(above)
                above = self.parents.get(above)
        return frozenset(found)
