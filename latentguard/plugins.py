"""What installed packages bring: entry points, loaded when they are asked for by their name."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from latentguard.errors import LatentGuardError

SPACES = "latentguard.spaces"
"""The group whose entry points are LatentSpaces, each by its own name."""
ENCODERS = "latentguard.encoders"
"""The group whose entry points are catalog entries of encoders (`encoders.catalog.Entry`)."""

T = TypeVar("T")


def names(group: str) -> list[str]:
    """The names of a group's entry points; nothing is imported."""
    return list(_found(group, tuple(sys.path)))


def load(group: str, name: str, kind: type[T], error: type[LatentGuardError]) -> T:
    """What the entry point of that name stands for.

    Raises `error` where it cannot be imported or is of another kind; it names the package.
    """
    point = _found(group, tuple(sys.path))[name]
    package = "a package" if point.dist is None else f"package {point.dist.name}"
    try:
        found = point.load()
    except Exception as reason:  # of a package that may do anything when it is imported
        raise error(
            f"{name!r} of {package} cannot be loaded ({group}: {point.value}): "
            f"{type(reason).__name__}: {reason}"
        ) from reason
    if not isinstance(found, kind):
        raise error(
            f"{name!r} of {package} ({group}: {point.value}) must be a {kind.__name__}, got "
            f"{type(found).__name__}"
        )
    return found


@lru_cache(maxsize=8)
def _found(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """The entry points of a group in a search path; the first of a name counts."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, point)
    return found
