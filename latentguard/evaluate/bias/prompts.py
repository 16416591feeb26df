"""Scenes, and the groups of people that they are asked for with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentguard.errors import PolicyError, UsageError
from latentguard.evaluate.generate.asked import Asked
from latentguard.yaml_nodes import compose, read_bytes

SHIPPED = Path(__file__).with_name("people.yaml")
"""A small list of this project's own."""

IMAGES = 4
SEED = 0


@dataclass(frozen=True)
class Scenes:
    """What is asked for.

    scenes: prompts with one "{}" each. axes: by name, for each group what stands in its place.
    """

    name: str
    scenes: tuple[str, ...]
    axes: Mapping[str, Mapping[str, str]]


def read_scenes(path: Path) -> tuple[Scenes, str]:
    """A YAML file of scenes, and the hex digest of its bytes. Raises UsageError naming the file."""
    try:
        data = read_bytes(path)
        values = compose(data, str(path)).plain()
    except PolicyError as error:
        raise UsageError(str(error)) from error
    try:
        return _scenes(values), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def cells_of(scenes: Scenes) -> list[tuple[int, str, str]]:
    """(scene, axis, group) of each row of prompts, in their order."""
    return [
        (scene, axis, group)
        for scene in range(len(scenes.scenes))
        for axis, groups in scenes.axes.items()
        for group in groups
    ]


def asked_of(scenes: Scenes, images: int = IMAGES, seed: int = SEED) -> list[Asked]:
    """`images` images of each scene and group; the k-th has the same seed for every group, so that
    a scene differs by who is asked for alone."""
    return [
        Asked(
            f"{row:05}/{index:04}",
            row,
            index,
            scenes.scenes[scene].replace("{}", scenes.axes[axis][group]),
            seed + scene * images + index,
        )
        for row, (scene, axis, group) in enumerate(cells_of(scenes))
        for index in range(images)
    ]


def _scenes(values: Any) -> Scenes:
    keys = {"schema_version", "name", "scenes", "axes"}
    if not isinstance(values, dict) or set(values) != keys:
        raise ValueError(f"must be a mapping with {', '.join(sorted(keys))}")
    if values["schema_version"] != 1:
        raise ValueError(f"schema_version must be 1, got {values['schema_version']!r}")
    scenes, axes = values["scenes"], values["axes"]
    if not isinstance(scenes, list) or not scenes:
        raise ValueError("scenes must be a list of prompts")
    for scene in scenes:
        if not isinstance(scene, str) or scene.count("{}") != 1:
            raise ValueError(f"a scene must have one {{}} for who is in it, got {scene!r}")
    if not isinstance(axes, dict) or not axes:
        raise ValueError("axes must be a mapping from a name to groups")
    for name, groups in axes.items():
        if not isinstance(groups, dict) or len(groups) < 2:
            raise ValueError(f"axis {name!r} must have two groups or more")
        for group, who in groups.items():
            if not isinstance(who, str) or not who.strip():
                raise ValueError(f"group {group!r} of axis {name!r} must be text, got {who!r}")
    return Scenes(str(values["name"]), tuple(scenes), axes)
