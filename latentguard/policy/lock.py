"""Calibrated thresholds: NAME.lock.yaml beside NAME.yaml, written by calibration, read with it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from latentguard.atomic import replacing
from latentguard.errors import PolicyError
from latentguard.policy.fields import (
    Digest,
    Filled,
    Frozen,
    Label,
    Margin,
    NoiseLevel,
    Rate,
    Slug,
    rule,
)
from latentguard.policy.problems import validate
from latentguard.yaml_nodes import compose, read_bytes


class CalibratedMargin(Frozen):
    """A margin that `fpr` of the harmless images reach or exceed."""

    fpr: Rate
    """The false-positive rate."""
    margin: Margin
    """The threshold that gives it."""


class LockEntry(Frozen):
    """The calibration of one concept, for one model, latent space and noise level."""

    model: Label
    """The encoder's name."""
    model_sha256: Digest
    """The digest of its weights."""
    space: Slug
    """The latent space."""
    noise_level: NoiseLevel = 0.0
    """The noise-to-signal ratio of the latents calibrated on."""
    concept: Slug
    """The concept's id in the policy."""
    prompts_sha256: Digest
    """`Policy.prompts_sha256` of the concept at that time: other prompts, other scores."""
    margins: Filled[tuple[CalibratedMargin, ...]]
    """Margins by rate, from the lowest rate to the highest."""
    calibrated_on: Label | None = None
    """What was measured, for people."""

    @field_validator("margins")
    @classmethod
    def _ordered(cls, margins: tuple[CalibratedMargin, ...]) -> tuple[CalibratedMargin, ...]:
        for index, (low, high) in enumerate(pairwise(margins), start=1):
            if not low.fpr < high.fpr:
                raise rule(f"must have a rate above the one before, {low.fpr:g}", index, "fpr")
            if low.margin < high.margin:
                raise rule(
                    "must not have a margin above that of a lower rate, "
                    f"{low.margin:g}, got {high.margin:g}",
                    index,
                    "margin",
                )
        return margins

    @property
    def key(self) -> tuple[str, str, str, float, str]:
        """What an entry is looked up by; a lock holds each once."""
        return self.model, self.model_sha256, self.space, self.noise_level, self.concept


class Lock(Frozen):
    """The calibrated thresholds of one policy."""

    schema_version: Literal[1]
    """The version of this language."""
    entries: tuple[LockEntry, ...] = ()
    """One for each model, space, noise level and concept."""

    @field_validator("entries")
    @classmethod
    def _unique(cls, entries: tuple[LockEntry, ...]) -> tuple[LockEntry, ...]:
        seen: dict[tuple[str, str, str, float, str], int] = {}
        for index, entry in enumerate(entries):
            first = seen.setdefault(entry.key, index)
            if first != index:
                raise rule(
                    "repeats the model, space, noise level and concept "
                    f"({entry.concept}) of entries[{first}]",
                    index,
                )
        return entries


def lock_path(policy_path: str | Path) -> Path:
    """Where the lock of the policy at `policy_path` lies: NAME.lock.yaml beside NAME.yaml."""
    path = Path(policy_path)
    return path.with_name(f"{path.stem}.lock.yaml")


def parse_lock(data: bytes, source: str = "lock") -> Lock:
    """A lock from the bytes of its YAML file.

    source: the file's name, for messages.
    Raises PolicyError: one sentence with name, line and key for each thing that is wrong.
    """
    return validate(Lock, compose(data, source), source, "a lock file")


def load_lock(path: str | Path) -> Lock:
    """The lock file at `path`. Raises PolicyError as `parse_lock` does."""
    return parse_lock(read_bytes(Path(path)), str(path))


def write_lock(path: str | Path, lock: Lock) -> None:
    """Write `lock` to `path`, sorted, in one step: readers see the old file or the new one.

    Raises PolicyError where it would exceed the 1 MiB that is read again, or cannot be written.
    """
    path = Path(path)
    lines = [
        "# Calibrated thresholds, written by latentguard; part of the policy's digest.",
        f"schema_version: {lock.schema_version}",
        "entries:" if lock.entries else "entries: []",
    ]
    for entry in sorted(lock.entries, key=lambda entry: entry.key):
        lines += _entry_lines(entry)
    encoded = "\n".join([*lines, ""]).encode()
    parse_lock(encoded, str(path))  # what cannot be read again must not replace what can
    try:
        with replacing(path) as file:
            file.write(encoded)
    except OSError as error:
        raise PolicyError(f"{path}: cannot be written: {error.strerror or error}") from error


def _entry_lines(entry: LockEntry) -> list[str]:
    """One entry in YAML. Values are written as JSON, so that a digest of digits stays text."""
    lines = []
    for key, value in entry.model_dump(mode="json", exclude_none=True).items():
        if key == "margins":
            lines.append("margins:")
            lines += [f"  - {{fpr: {m['fpr']!r}, margin: {m['margin']!r}}}" for m in value]
        else:
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    return [f"  - {lines[0]}", *(f"    {line}" for line in lines[1:])]
