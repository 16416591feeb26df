"""The entry of a finished shard in a run's manifest: what was read, and what came of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from latentguard.files import PassedOver
from latentguard.files.remote import FileState

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Written:
    """A file of a run. rows: records, or samples of a copy."""

    name: str
    size: int
    sha256: str
    rows: int


@dataclass
class Entry:
    """One shard that is done.

    number, files: of the shard. states: what its files were when they were read; one that could
    not be opened has none.
    part: its records. tally: their `tally.Tally`, as JSON. quarantine, kept: what could not be read
    or judged, and the copy of samples, where there are any.
    images: how many the shard holds, of a sample those too that were not looked at.
    outcomes, decisions: counts, as in `Summary`. models: the name and SHA-256 of what judged, by
    latent space. passed: what its files held that cannot be latents.
    microseconds: by phase, as in the tally. version: of latentguard.
    """

    number: int
    files: tuple[str, ...]
    states: dict[str, FileState]
    part: Written
    tally: Written
    images: int
    outcomes: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    models: dict[str, tuple[str, str]] = field(default_factory=dict)
    passed: PassedOver = field(default_factory=PassedOver)
    quarantine: Written | None = None
    kept: Written | None = None
    microseconds: Counter[str] = field(default_factory=Counter)
    version: str = ""

    @property
    def errors(self) -> int:
        """Records of what could not be read or judged."""
        return self.outcomes["error"]

    @property
    def written(self) -> list[Written]:
        """The files of the run that belong to this shard."""
        return [self.part, self.tally, *filter(None, (self.quarantine, self.kept))]

    def to_json(self) -> bytes:
        """As it stands in the manifest."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "latentguard": self.version,
            "number": self.number,
            "files": [{"name": name, **_state(self.states.get(name))} for name in self.files],
            "images": self.images,
            "outcomes": dict(self.outcomes),
            "decisions": dict(self.decisions),
            "models": {
                space: {"name": name, "sha256": sha256}
                for space, (name, sha256) in self.models.items()
            },
            "passed": vars(self.passed),
            "part": vars(self.part),
            "tally": vars(self.tally),
            "quarantine": self.quarantine and vars(self.quarantine),
            "kept": self.kept and vars(self.kept),
            "microseconds": dict(self.microseconds),
        }
        return json.dumps(data).encode("ascii") + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises ValueError for what `to_json` did not write."""
        try:
            values = json.loads(data)
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version must be {SCHEMA_VERSION}")
            return cls(
                number=values["number"],
                files=tuple(file["name"] for file in values["files"]),
                states={
                    file["name"]: FileState(file["size"], file["version"])
                    for file in values["files"]
                    if file["size"] is not None
                },
                part=Written(**values["part"]),
                tally=Written(**values["tally"]),
                images=values["images"],
                outcomes=Counter(values["outcomes"]),
                decisions=Counter(values["decisions"]),
                models={
                    space: (model["name"], model["sha256"])
                    for space, model in values["models"].items()
                },
                passed=_passed(values["passed"]),
                quarantine=_written(values["quarantine"]),
                kept=_written(values["kept"]),
                microseconds=Counter(values["microseconds"]),
                version=values["latentguard"],
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"is not an entry of a manifest: {error!r}") from error


def _state(state: FileState | None) -> dict[str, Any]:
    if state is None:
        return {"size": None, "version": ""}
    return {"size": state.size, "version": state.version}


def _written(values: Mapping[str, Any] | None) -> Written | None:
    return None if values is None else Written(**values)


def _passed(values: Mapping[str, Any]) -> PassedOver:
    counts = {name: Counter(values[name]) for name in ("files", "members")}
    return PassedOver(**{**values, **counts})
