"""What is in an exported .onnx file, looked at before ONNX Runtime sees it.

The file is untrusted: operators other than the standard ones, external data outside of its folder,
and metadata that do not fit are refused. The digest inside of the file tells of damage; whoever
edits a file can compute it anew, so production pins the whole file (`Guard(path, sha256=...)`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentguard.errors import ModelError
from latentguard.runtime.wire import Field, WireError, fields, message, text

SCHEMA_VERSION = 1
METADATA, DIGEST = "latentguard", "latentguard.digest"
INPUT = "latents"
OUTPUTS = ("probability", "margin", "best_prompt", "embedding")
HEATMAP = "heatmap"

_STANDARD = ("", "ai.onnx")
_MAX_FILE = 2**31
_MAX_EXTERNAL = 2**34
_MAX_DEPTH = 8

# What runtime and verdicts read of the metadata, by type.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "policy": dict,
    "prompts": list,
    "covered": list,
    "model": dict,
    "space": str,
    "scaled": bool,
    "channels": int,
    "packed_patch": int,
    "dim": int,
    "logit_scale": float,
    "precision": str,
    "height": (int, type(None)),
    "width": (int, type(None)),
    "files": dict,
}


@dataclass(frozen=True)
class Artefact:
    """A file that passed: its path, SHA-256, metadata, and whether it makes heat maps."""

    path: Path
    sha256: str
    metadata: dict[str, Any]
    heatmaps: bool


def open_artefact(path: str | Path, sha256: str | None = None) -> Artefact:
    """Look into a file. Raises ModelError, naming the file, for whatever is wrong with it."""
    path = Path(path)
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and not hmac.compare_digest(digest, sha256.strip().lower()):
        raise ModelError(f"{path}: has SHA-256 {digest}, not the pinned {sha256}")
    try:
        return _inspect(path, digest, data)
    except (WireError, RecursionError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: is no readable .onnx file ({error})") from error


def inner_digest(data: bytes | memoryview) -> str:
    """SHA-256 of a model file's top-level fields, without the entry that holds this digest."""
    hasher = hashlib.sha256()
    for item in fields(memoryview(data)):
        if item.number != 14 or _entry(item)[0] != DIGEST:
            hasher.update(item.raw)
    return hasher.hexdigest()


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ModelError(f"{path}: {path.stat().st_size} bytes are more than 2 GiB")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


def _inspect(path: Path, digest: str, data: bytes) -> Artefact:
    metadata: dict[str, str] = {}
    graph: memoryview | None = None
    for item in fields(memoryview(data)):
        if item.number == 7:
            if graph is not None:
                raise ModelError(f"{path}: holds more than one graph")
            graph = message(item.value)
        elif item.number == 8:
            _check_domain(path, _name(item), "imports")
        elif item.number == 14:
            key, value = _entry(item)
            if key in metadata:
                raise ModelError(f"{path}: holds the metadata {key!r} twice")
            metadata[key] = value
        elif item.number in (20, 25):
            raise ModelError(
                f"{path}: holds functions or training data, which no export of ours has"
            )
    if graph is None:
        raise ModelError(f"{path}: holds no graph")
    found = _metadata(path, metadata, data)
    names = _Graph(path, found["files"]).check(graph)
    expected = {*OUTPUTS, HEATMAP} if HEATMAP in names.outputs else {*OUTPUTS}
    if names.inputs != [INPUT] or {*names.outputs} != expected:
        raise ModelError(
            f"{path}: must have the input {INPUT} and the outputs {', '.join(OUTPUTS)}, has "
            f"{', '.join(names.inputs)} and {', '.join(names.outputs)}"
        )
    for name, sha in found["files"].items():
        _check_external(path, name, sha)
    return Artefact(path, digest, found, HEATMAP in names.outputs)


def _metadata(path: Path, metadata: dict[str, str], data: bytes) -> dict[str, Any]:
    if METADATA not in metadata or DIGEST not in metadata:
        raise ModelError(
            f"{path}: has no latentguard metadata: use a file that `latentguard export onnx` wrote"
        )
    if not hmac.compare_digest(inner_digest(data), metadata[DIGEST]):
        raise ModelError(f"{path}: does not have the digest that it states: damaged or edited")
    found = json.loads(metadata[METADATA])
    if not isinstance(found, dict):
        raise ModelError(f"{path}: its metadata must be a mapping")
    version = found.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ModelError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {version!r}")
    for key, kind in _KEYS.items():
        value = found.get(key, ...)
        if value is ... or not isinstance(value, kind) or (kind is int and type(value) is bool):
            raise ModelError(f"{path}: its metadata has no valid {key}")
    model = found["model"]
    if not all(isinstance(model.get(key), str) for key in ("name", "sha256")):
        raise ModelError(f"{path}: its metadata must name the model and its sha256")
    concepts = found["policy"].get("concepts")
    if not isinstance(concepts, list) or len(concepts) != len(found["covered"]):
        raise ModelError(f"{path}: its policy and its list of covered concepts do not fit")
    return found


class _Names:
    def __init__(self) -> None:
        self.inputs: list[str] = []
        self.outputs: list[str] = []


class _Graph:
    """A walk over a graph and the graphs in its attributes."""

    def __init__(self, path: Path, files: dict[str, str]) -> None:
        self._path = path
        self._files = files

    def check(self, graph: memoryview, depth: int = 0) -> _Names:
        """Refuse what must not be there; the names of inputs and outputs."""
        if depth > _MAX_DEPTH:
            raise ModelError(f"{self._path}: graphs within graphs, more than {_MAX_DEPTH} deep")
        names, initial = _Names(), set()
        for item in fields(graph):
            if item.number == 1:
                self._node(message(item.value), depth)
            elif item.number == 5:
                initial.add(self._tensor(message(item.value)))
            elif item.number == 11:
                names.inputs.append(_name(item))
            elif item.number == 12:
                names.outputs.append(_name(item))
            elif item.number == 15:
                raise ModelError(f"{self._path}: holds sparse tensors, which no export of ours has")
        names.inputs = [name for name in names.inputs if name not in initial]
        return names

    def _node(self, node: memoryview, depth: int) -> None:
        for item in fields(node):
            if item.number == 7:
                _check_domain(self._path, text(item.value), "has an operator of")
            elif item.number == 5:
                for part in fields(message(item.value)):
                    if part.number in (5, 10):
                        self._tensor(message(part.value))
                    elif part.number in (6, 11):
                        self.check(message(part.value), depth + 1)

    def _tensor(self, tensor: memoryview) -> str:
        name = ""
        for item in fields(tensor):
            if item.number == 8:
                name = text(item.value)
            elif item.number == 13:
                key, value = _entry(item)
                if key == "location" and value not in self._files:
                    raise ModelError(
                        f"{self._path}: refers to external data {value!r}, which its metadata do "
                        "not list"
                    )
        return name


def _check_domain(path: Path, domain: str, verb: str) -> None:
    if domain not in _STANDARD:
        raise ModelError(
            f"{path}: {verb} the operator set {domain!r}; only standard ONNX operators are run"
        )


def _check_external(path: Path, name: str, sha256: Any) -> None:
    """External data lie beside the file, under a plain name, and are what was exported."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}", name):
        raise ModelError(
            f"{path}: external data must lie beside it under a plain name, not {name!r}"
        )
    beside = path.parent / name
    if beside.is_symlink() or not beside.is_file():
        raise ModelError(f"{beside}: is missing, or is not a plain file")
    if beside.stat().st_size > _MAX_EXTERNAL:
        raise ModelError(f"{beside}: {beside.stat().st_size} bytes are more than 16 GiB")
    hasher = hashlib.sha256()
    with beside.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    if not isinstance(sha256, str) or not hmac.compare_digest(hasher.hexdigest(), sha256):
        raise ModelError(f"{beside}: does not have the SHA-256 that {path.name} states")


def _name(item: Field) -> str:
    """The first field of a message: a value's name, an operator set's domain."""
    for part in fields(message(item.value)):
        if part.number == 1:
            return text(part.value)
    return ""


def _entry(item: Field) -> tuple[str, str]:
    """The key and the value of a metadata entry."""
    found = {part.number: text(part.value) for part in fields(message(item.value))}
    return found.get(1, ""), found.get(2, "")
