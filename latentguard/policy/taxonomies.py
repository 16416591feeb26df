"""Published hazard schemes, into whose categories a policy's concepts can be mapped.

A scheme is one file in policies/taxonomies, and is known by being there. The files hold names and
identifiers, where they are published and in which version; docs/taxonomies.md says what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator

from latentguard.policy.fields import Filled, Frozen, Label, Slug, rule
from latentguard.policy.problems import closest, validate
from latentguard.policy.shipped import shipped_files
from latentguard.yaml_nodes import compose, read_bytes, show

MAX_LISTED = 20
"""Categories that a message names one by one."""


class Category(Frozen):
    """One category of a scheme."""

    id: Label
    """What the scheme itself calls it where programs read it."""
    name: Label | None = None
    """What people call it; its id where there is no other name."""
    parent: Label | None = None
    """The category that holds it: what counts for this one counts for that one, too."""


class Severities(Frozen):
    """A scheme's level for each severity of a concept."""

    low: int
    medium: int
    high: int
    critical: int


class Scheme(Frozen):
    """A published hazard scheme."""

    schema_version: Literal[1]
    """The version of this form of file."""
    name: Slug
    """What policies and options call it: the file's name."""
    title: Label
    """What people call it."""
    version: Label
    """Which version of the scheme this is."""
    source: Label
    """Where it is published."""
    severities: Severities | None = None
    """Its levels, where it has levels. 0 is the one of what did not match."""
    categories: Filled[tuple[Category, ...]]
    """All of them, a parent before its children."""

    @field_validator("categories")
    @classmethod
    def _sound(cls, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        known: set[str] = set()
        for index, category in enumerate(categories):
            if category.id in known:
                raise rule(f"must be unique, '{category.id}' stands before", index, "id")
            if category.parent is not None and category.parent not in known:
                raise rule(f"must stand before, got '{category.parent}'", index, "parent")
            known.add(category.id)
        return categories

    def to_dict(self) -> dict[str, Any]:
        """The scheme as JSON-able data, as it travels with a policy; every category has a name."""
        data = self.model_dump(mode="json", exclude={"schema_version", "name"})
        for category in data["categories"]:
            category["name"] = category["name"] or category["id"]
        return data


@cache
def schemes() -> Mapping[str, Scheme]:
    """The schemes that ship, by name. Raises PolicyError for a file that is none."""
    found = {}
    for name, path in shipped_files("taxonomies").items():
        root = compose(read_bytes(path), str(path))
        found[name] = validate(Scheme, root, str(path), "a taxonomy")
    return found


def _mapped(value: Any) -> Any:
    """Check a concept's `taxonomy`: {scheme: [category, ...]}."""
    if not isinstance(value, Mapping):
        raise rule(f"must be a mapping of schemes to lists of categories, got {show(value)}")
    return {str(name): _categories(str(name), given) for name, given in value.items()}


def _categories(name: str, given: Any) -> tuple[str, ...]:
    scheme = schemes().get(name)
    if scheme is None:
        near = closest(name, schemes())
        hint = f"did you mean '{near}'?" if near else f"known are {', '.join(schemes())}"
        raise rule(f"is not a known taxonomy; {hint}", name)
    if not isinstance(given, list | tuple) or not given:
        raise rule(f"must be a list of categories, not empty, got {show(given)}", name)
    for index, category in enumerate(given):
        if not isinstance(category, str) or category not in _ids(scheme):
            raise rule(_unknown(category, scheme), name, index)
        if category in given[:index]:
            raise rule(f"stands twice ('{category}')", name, index)
    return tuple(given)


def _ids(scheme: Scheme) -> list[str]:
    return [category.id for category in scheme.categories]


def _unknown(word: Any, scheme: Scheme) -> str:
    """What is wrong with a category, with the nearest one by its id or by its name."""
    called = {c.name.lower(): c.id for c in scheme.categories if c.name is not None}
    called |= {c.id.lower(): c.id for c in scheme.categories}
    near = closest(word, called) if isinstance(word, str) else None
    every = f"known are {', '.join(_ids(scheme))}"
    if len(_ids(scheme)) > MAX_LISTED:
        every = f"taxonomies/{scheme.name}.yaml lists all {len(_ids(scheme))}"
    hint = f"did you mean '{called[near]}'?" if near else every
    return f"is no category of {scheme.title} {scheme.version}, got {show(word)}; {hint}"


class _Schemes:
    """For editors: which schemes there are, and their categories."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                name: {
                    "type": "array",
                    "minItems": 1,
                    "uniqueItems": True,
                    "description": f"{scheme.title} {scheme.version}: {scheme.source}",
                    "items": {"enum": _ids(scheme)},
                }
                for name, scheme in schemes().items()
            },
        }


Taxonomy = Annotated[dict[str, tuple[str, ...]], BeforeValidator(_mapped), _Schemes()]
"""Categories of published schemes, by the scheme's name."""
