"""Concepts that were learned from examples: what their files hold, read without pickle or torch.

A file holds one concept as one or more models see it. For each model it has a linear head over the
model's own features, how many examples it was learned from, what cross-validation says of it, and
the sums from which more examples can be added later. Pictures and latents are not in it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentguard.atomic import replacing
from latentguard.errors import MissingExtraError, ModelError, PolicyError
from latentguard.regular import problem, read_bounded
from latentguard.text import first_line

FORMAT = "latentguard-concept"
SCHEMA_VERSION = 1
_KEY = "latentguard"
MAX_BYTES = 64 << 20
"""No concept's file is larger; a larger file is something else."""
MAX_ENTRIES = 64
MAX_FEATURES = 1 << 16

Kind = Literal["trunk", "joint"]
_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True, eq=False)
class Learned:
    """One concept as one model sees it.

    The margin of an image is weight . x + bias, where x is the unit-norm feature vector of
    `latentguard.encoders.example_features`; its probability is sigmoid(logit scale * margin), as
    for prompts.

    model, model_sha256, space: what it was learned for.
    features: "trunk" (what the model knows before its text space) or "joint" (its embedding).
    weight: [F] float32. bias: of the margin.
    joint: [dim] float32, the mean embedding of the negatives in the model's joint space, by which
        the head is brought level with contrast prompts.
    positives, negatives: how many examples there were. background: whether the negatives are those
        that come with the package.
    figures: what cross-validation found, as JSON-able data.
    statistics: the sums that `latentguard concept merge` adds up.
    """

    model: str
    model_sha256: str
    space: str
    features: Kind
    weight: NDArray[np.float32]
    bias: float
    joint: NDArray[np.float32]
    positives: int
    negatives: int
    background: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """What an entry is looked up by; a file holds each once."""
        return self.model, self.model_sha256, self.space

    @property
    def reach(self) -> float:
        """No image has a larger margin than this, whatever its sign: its features have norm 1."""
        return float(np.linalg.norm(self.weight.astype(np.float64))) + abs(self.bias)


@dataclass(frozen=True, eq=False)
class ConceptFile:
    """A concept's file: its name, an entry for each model, and the SHA-256 of its bytes."""

    name: str
    entries: tuple[Learned, ...]
    sha256: str
    path: str = ""

    @property
    def label(self) -> str:
        """What verdicts say where a prompt would stand."""
        return f"examples of {self.name}"

    @property
    def reach(self) -> float:
        """The largest of its entries'."""
        return max(entry.reach for entry in self.entries)

    def entry(self, model: str, sha256: str, space: str) -> Learned:
        """The entry of a model. Raises ModelError where it was not learned for that."""
        for entry in self.entries:
            if entry.key == (model, sha256, space):
                return entry
        known = [entry for entry in self.entries if entry.model == model]
        if any(entry.space == space for entry in known):
            why = f"for {model} with other weights"
        elif known:
            why = f"for {model} on {' and '.join(sorted(e.space for e in known))} latents"
        else:
            why = f"for {' and '.join(dict.fromkeys(entry.model for entry in self.entries))}"
        raise ModelError(
            f"{self.path or self.name}: concept '{self.name}' was learned {why}, not for {model} "
            f"({sha256[:12]}) on {space} latents: learn it for that model, too "
            "(latentguard concept learn --model)"
        )


def load_concept(path: str | Path) -> ConceptFile:
    """Read a concept's file. Raises PolicyError, one sentence, where it is none or was damaged."""
    try:
        data = read_bounded(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise PolicyError(f"{path}: no such file") from error
    except OSError as error:
        raise PolicyError(f"{path}: {problem(error)}") from error
    return parse_concept(data, str(path))


def parse_concept(data: bytes, source: str = "concept") -> ConceptFile:
    """A concept from the bytes of its file. Raises PolicyError as `load_concept` does, and
    MissingExtraError where safetensors is not installed."""
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{source}: concepts that were learned from examples need {error.name}, which is not "
            "installed: pip install 'latentguard[torch]'"
        ) from error
    try:
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"][_KEY])
        found = about["format"], about["schema_version"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"it has no {error} in it" if isinstance(error, KeyError) else first_line(error)
        raise PolicyError(
            f"{source}: is not a concept's file, as `latentguard concept learn` writes it ({why})"
        ) from error
    if found != (FORMAT, SCHEMA_VERSION):
        raise PolicyError(
            f"{source}: is {found[0]!r:.60} of version {found[1]!r:.20}, this latentguard reads "
            f"{FORMAT!r} of version {SCHEMA_VERSION}"
        )
    try:
        name, said = _name(about["name"]), about["entries"]
        if not isinstance(said, list) or not 1 <= len(said) <= MAX_ENTRIES:
            raise ValueError(f"it must have 1 to {MAX_ENTRIES} entries")
        entries = tuple(_entry(index, one, tensors) for index, one in enumerate(said))
        if len({entry.key for entry in entries}) < len(entries):
            raise ValueError("two entries are of one model and space")
        if set(tensors) != {name for i, e in enumerate(entries) for name in _arrays(i, e)}:
            raise ValueError("it has other arrays than its entries name")
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise PolicyError(f"{source}: damaged, or edited by hand: {what}") from error
    return ConceptFile(name, entries, hashlib.sha256(data).hexdigest(), source)


def write_concept(path: str | Path, name: str, entries: Sequence[Learned]) -> ConceptFile:
    """Write a concept's file, whole or not at all; the same entries give the same bytes.

    Raises PolicyError for what could not be read again; OSError where it cannot be written.
    """
    import safetensors.numpy

    arrays: dict[str, NDArray[Any]] = {}
    said = []
    for index, entry in enumerate(entries):
        arrays |= {k: np.ascontiguousarray(v) for k, v in _arrays(index, entry).items()}
        said.append(
            {
                "model": entry.model,
                "model_sha256": entry.model_sha256,
                "space": entry.space,
                "features": entry.features,
                "bias": entry.bias,
                "positives": entry.positives,
                "negatives": entry.negatives,
                "background": entry.background,
                "figures": dict(entry.figures),
                "statistics": sorted(entry.statistics),
            }
        )
    about = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "name": name, "entries": said}
    # In one value, as the library writes several in an order that differs from run to run.
    text = json.dumps(about, sort_keys=True, allow_nan=False)
    data = safetensors.numpy.save(arrays, {_KEY: text})
    found = parse_concept(data, str(path))
    with replacing(path) as file:
        file.write(data)
    return found


def _arrays(index: int, entry: Learned) -> dict[str, NDArray[Any]]:
    """An entry's arrays by their names in the file."""
    own = {"weight": entry.weight, "joint": entry.joint}
    sums = {f"statistics.{name}": value for name, value in entry.statistics.items()}
    return {f"{index}.{name}": value for name, value in (own | sums).items()}


def _entry(index: int, said: Any, tensors: Mapping[str, NDArray[Any]]) -> Learned:
    """Raises ValueError, TypeError or KeyError for what no writer wrote."""
    if not isinstance(said, dict):
        raise TypeError("an entry is no mapping")
    entry = Learned(
        model=_text(said["model"], "model"),
        model_sha256=_digest(said["model_sha256"]),
        space=_text(said["space"], "space"),
        features=_kind(said["features"]),
        weight=_vector(tensors[f"{index}.weight"], "weight"),
        bias=float(said["bias"]),
        joint=_vector(tensors[f"{index}.joint"], "joint"),
        positives=_count(said["positives"], "positives"),
        negatives=_count(said["negatives"], "negatives"),
        background=said["background"] is True,
        figures=_mapping(said["figures"]),
        statistics={
            name: _finite(tensors[f"{index}.statistics.{name}"], name)
            for name in map(str, said["statistics"])
        },
    )
    if not math.isfinite(entry.reach):
        raise ValueError("its head is not finite")
    return entry


def _name(given: Any) -> str:
    text = _text(given, "name")
    if not text.isprintable():
        raise ValueError("its name is not one line of printable text")
    return text


def _text(given: Any, what: str) -> str:
    if not isinstance(given, str) or not given.strip() or len(given) > 200:
        raise ValueError(f"its {what} must be text of 1 to 200 characters, got {given!r:.60}")
    return given


def _digest(given: Any) -> str:
    if not isinstance(given, str) or len(given) != 64 or not set(given) <= _DIGITS:
        raise ValueError(f"model_sha256 must be a SHA-256 digest, got {given!r:.80}")
    return given


def _kind(given: Any) -> Kind:
    if given not in ("trunk", "joint"):
        raise ValueError(f"features must be trunk or joint, got {given!r:.60}")
    kind: Kind = given
    return kind


def _count(given: Any, what: str) -> int:
    if type(given) is not int or given < 0:
        raise ValueError(f"{what} must be a whole number, got {given!r:.60}")
    return given


def _mapping(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise TypeError("its figures are no mapping")
    return given


def _vector(array: NDArray[Any], what: str) -> NDArray[np.float32]:
    if array.ndim != 1 or not 1 <= array.size <= MAX_FEATURES or array.dtype != np.float32:
        raise ValueError(f"{what} must be float32 [F], got {array.dtype} {list(array.shape)}")
    vector: NDArray[np.float32] = _finite(array, what)
    return vector


def _finite(array: NDArray[Any], what: str) -> NDArray[Any]:
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise ValueError(f"{what} holds what is not a finite number")
    return array
