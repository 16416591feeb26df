"""The contents of an exported .onnx file, checked before ONNX Runtime sees them.

The file is untrusted. Operators other than the standard ones, external data outside its folder, and
metadata that do not fit are refused. The digest in the file only detects damage, because anyone who
edits a file can compute it again. So production pins the whole file (`Guard(path, sha256=...)`).

Every file is read once, and exactly the bytes that were checked are run: the session is made from
these bytes, and not from a path that may lead to other bytes a moment later. The bytes must be in
the one form in which all readers of protocol buffers see the same (`latentguard.runtime.wire`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentguard.errors import LatentsError, ModelError
from latentguard.regular import open_regular, problem, read_whole
from latentguard.runtime.graph import check_graph
from latentguard.runtime.layout import ENTRY, MODEL
from latentguard.runtime.names import DIGEST, HEATMAP, INPUT, METADATA, OUTPUTS, STANDARD, plain
from latentguard.runtime.wire import ForeignError, Message, fields, read, text
from latentguard.spaces import RECORDS, SPACES, LatentSpace

SCHEMA_VERSION = 1
_MAX_FILE = 2**31
_MAX_EXTERNAL = 2**34
_MAX_METADATA = 2**26

# What runtime and verdicts read of the metadata, by type.
_KEYS: dict[str, tuple[type, ...]] = {
    "schema_version": (int,),
    "policy": (dict,),
    "prompts": (list,),
    "covered": (list,),
    "model": (dict,),
    "space": (str,),
    "scaled": (bool,),
    "channels": (int,),
    "packed_patch": (int,),
    "dim": (int,),
    "logit_scale": (float,),
    "precision": (str,),
    "height": (int, type(None)),
    "width": (int, type(None)),
    "files": (dict,),
}
# Of prompts: what files of former versions lack.
_LATER: dict[str, tuple[type, ...]] = {
    "seen": (list, type(None)),
    "unseen_contrast": (list, type(None)),
    "own_space": (dict, type(None)),
}
_POLICY = ("name", "version", "sha256")
# What the two files of a cascade have in common: they read the same arrays.
_SHARED = ("space", "scaled", "channels", "packed_patch", "height", "width")


@dataclass(frozen=True)
class Artifact:
    """A file that passed.

    sha256: of the file; its metadata hold those of the external data, so it pins them, too.
    heatmaps: whether it makes heat maps.
    data: the bytes of the file. external: those of the files beside it, by name.
    first: of the first model of the policy's cascade, which lies beside it; pinned in the same way.
    """

    path: Path
    sha256: str
    metadata: dict[str, Any]
    heatmaps: bool
    data: bytes = field(repr=False)
    external: dict[str, bytes] = field(repr=False)
    first: Artifact | None = None


def open_artifact(path: str | Path, sha256: str | None = None) -> Artifact:
    """Check a file, and the files next to it that it names.

    Raises ModelError, which names the file, for anything that is wrong.
    """
    path = Path(path)
    if path.suffix != ".onnx" and "\0" not in str(path) and not path.exists():
        raise ModelError(f"{path}: is not a file; give one that `latentguard export onnx` wrote")
    data = _read(path, _MAX_FILE)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and not hmac.compare_digest(digest.encode(), _pin(sha256)):
        raise ModelError(f"{path}: has SHA-256 {digest}, not the pinned {sha256}")
    found = _look(path, digest, data)
    named = found.metadata["first"]
    return found if named is None else replace(found, first=_first(found, **named))


def _look(path: Path, digest: str, data: bytes) -> Artifact:
    try:
        return _inspect(path, digest, data)
    except ModelError:
        raise
    except ForeignError as error:
        raise ModelError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:  # of the wire format, of JSON, of its numbers
        raise ModelError(f"{path}: is no readable .onnx file ({error})") from error


def _first(main: Artifact, file: str, sha256: str) -> Artifact:
    """The first model of the cascade in `main`: another export for the same arrays and policy."""
    data = _beside(main.path, file, sha256, _MAX_FILE)
    first = _look(main.path.parent / file, sha256, data)
    for key in _SHARED:
        ours, theirs = main.metadata[key], first.metadata[key]
        if ours != theirs:
            raise ModelError(
                f"{main.path}: has {key} {ours}, and its first model {file} {theirs}: export both "
                "anew"
            )
    # Without the cascade, and so with another digest.
    own = {"cascade": None, "sha256": None}
    if main.metadata["policy"] | own != first.metadata["policy"] | {"sha256": None}:
        raise ModelError(
            f"{main.path}: its first model {file} judges by another policy: export both anew"
        )
    return first


def inner_digest(data: bytes) -> str:
    """SHA-256 of a model file's top-level fields, without the entry that holds this digest."""
    hasher, view = hashlib.sha256(), memoryview(data)
    for item in fields(data):
        if item.number != _ENTRIES or _key(data, item.begin, item.end) != DIGEST:
            hasher.update(view[item.start : item.end])
    return hasher.hexdigest()


def _key(data: bytes, begin: int, end: int) -> str:
    """The key of a metadata entry."""
    keys = [text(data, part) for part in fields(data, begin, end) if part.number == 1]
    return keys[-1] if keys else ""


def _pin(sha256: str) -> bytes:
    pinned = sha256.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", pinned):
        raise ModelError(f"a SHA-256 is 64 hexadecimal digits, got {sha256!r}")
    return pinned.encode()


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a regular file that is no larger than `limit`."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise ModelError(f"{path}: {size} bytes are more than {limit >> 30} GiB")
            return read_whole(file)
    except OSError as error:
        raise ModelError(f"{path}: {problem(error)}") from error


_ENTRIES = next(number for number, spec in MODEL.fields.items() if spec.of is ENTRY)
# By these bytes ONNX Runtime tells files of its own format, which nobody here looks into.
_FLATBUFFER = b"ORTM"


def _inspect(path: Path, digest: str, data: bytes) -> Artifact:
    if data[4:8] == _FLATBUFFER:
        raise ModelError(f"{path}: is a file of ONNX Runtime's own format, and not an .onnx file")
    model = read(data, MODEL)
    metadata: dict[str, str] = {}
    for entry in model.get("metadata_props", []):
        key = entry.get("key", "")
        if key in metadata:
            raise ModelError(f"{path}: holds the metadata {key!r} twice")
        metadata[key] = entry.get("value", "")
    for imported in model.get("opset_import", []):
        domain = imported.get("domain", "")
        if domain not in STANDARD:
            raise ModelError(
                f"{path}: imports the operator set {domain!r}; only standard ONNX operators are run"
            )
    graph: Message | None = model.get("graph")
    if graph is None:
        raise ModelError(f"{path}: holds no graph")
    found = _metadata(path, metadata, data)
    inputs, outputs = check_graph(path, graph, found)
    expected = {*OUTPUTS, HEATMAP} if HEATMAP in outputs else {*OUTPUTS}
    if inputs != [INPUT] or len(outputs) != len(expected) or {*outputs} != expected:
        raise ModelError(
            f"{path}: must have the input {INPUT} and the outputs {', '.join(OUTPUTS)}, has "
            f"{', '.join(inputs)} and {', '.join(outputs)}"
        )
    external = {
        name: _beside(path, name, sha, _MAX_EXTERNAL) for name, sha in found["files"].items()
    }
    return Artifact(path, digest, found, HEATMAP in outputs, data, external)


def _metadata(path: Path, metadata: dict[str, str], data: bytes) -> dict[str, Any]:
    if METADATA not in metadata or DIGEST not in metadata:
        raise ModelError(
            f"{path}: has no latentguard metadata: use a file that `latentguard export onnx` wrote"
        )
    others = sorted(metadata.keys() - {METADATA, DIGEST})
    if others:
        # ONNX Runtime takes settings of a session from some of them.
        raise ModelError(f"{path}: holds the metadata {others[0]!r}, which no export of ours has")
    if not hmac.compare_digest(inner_digest(data).encode(), metadata[DIGEST].encode()):
        raise ModelError(f"{path}: does not have the digest that it states: damaged or edited")
    if len(metadata[METADATA]) > _MAX_METADATA:
        raise ModelError(f"{path}: its metadata are longer than {_MAX_METADATA >> 20} MiB")
    found = json.loads(metadata[METADATA], parse_constant=_refuse_constant)
    if not isinstance(found, dict):
        raise ModelError(f"{path}: its metadata must be a mapping")
    version = found.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ModelError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {version!r:.40}")
    for key, kinds in _KEYS.items():
        if type(found.get(key, ...)) not in kinds:
            raise ModelError(f"{path}: its metadata have no valid {key}")
    for key, kinds in _LATER.items():
        if type(found.setdefault(key, None)) not in kinds:
            raise ModelError(f"{path}: its metadata have no valid {key}")
    _check_values(path, found)
    _check_cascade(path, found)
    return found


def _check_values(path: Path, found: dict[str, Any]) -> None:
    """The parts of the metadata fit each other, and the table of latent spaces."""
    space = _space(path, found)
    sides = (found["height"], found["width"])
    concepts = found["policy"].get("concepts")
    sound = {
        "space": space is not None,
        "channels": space is not None and found["channels"] == space.channels,
        "packed_patch": space is not None and found["packed_patch"] == space.packed_patch,
        "logit_scale": 0 < found["logit_scale"] < math.inf,
        "height and width": sides == (None, None)
        or all(type(side) is int and side > 0 for side in sides),
        "model": all(type(found["model"].get(key)) is str for key in ("name", "sha256")),
        "prompts": all(type(prompt) is str for prompt in found["prompts"]),
        "covered": all(type(flag) is bool for flag in found["covered"]),
        "seen": found["seen"] is None
        or (
            all(type(flag) is bool for flag in found["seen"])
            and len(found["seen"]) == len(found["prompts"])
        ),
        "unseen_contrast": all(type(text) is str for text in found["unseen_contrast"] or ()),
        "policy": all(type(found["policy"].get(key)) is str for key in _POLICY)
        and type(concepts) is list
        and len(concepts) == len(found["covered"]),
    }
    for key, good in sound.items():
        if not good:
            raise ModelError(f"{path}: its metadata have no valid {key}")


def _space(path: Path, found: dict[str, Any]) -> LatentSpace | None:
    """The space of the metadata's name: one that is known, else the one that the file describes."""
    if found["own_space"] is None:
        return SPACES.get(found["space"])
    try:
        space = LatentSpace.from_dict(found["own_space"], f"{path}: own_space")
    except LatentsError as error:
        raise ModelError(str(error)) from error
    return space if space.name == found["space"] and space.name not in RECORDS else None


def _check_cascade(path: Path, found: dict[str, Any]) -> None:
    """A policy's cascade needs the file of its first model, and the other way round."""
    cascade, first = found["policy"].get("cascade"), found.setdefault("first", None)
    if cascade is not None:
        unsure: Any = cascade.get("unsure") if type(cascade) is dict else None
        if not (type(unsure) in (int, float) and 0 <= unsure <= 2):
            raise ModelError(f"{path}: its metadata have no valid cascade")
    if first is not None and not (
        type(first) is dict
        and set(first) == {"file", "sha256"}
        and all(type(value) is str for value in first.values())
    ):
        raise ModelError(f"{path}: its metadata have no valid first")
    if (cascade is None) != (first is None):
        raise ModelError(
            f"{path}: its policy {'has a' if first is None else 'has no'} cascade, and it names "
            f"{'no' if first is None else 'a'} file of a first model: export it anew"
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} in the metadata")


def _beside(path: Path, name: str, sha256: Any, limit: int) -> bytes:
    """A file that `path` names: it lies beside it, and is what was exported."""
    if not plain(name):
        raise ModelError(
            f"{path}: a file that it names must lie beside it under a plain name, not {name!r}"
        )
    beside = path.parent / name
    if beside.is_symlink():
        raise ModelError(f"{beside}: is a link, the files of {path.name} must be plain files")
    data = _read(beside, limit)
    digest = hashlib.sha256(data).hexdigest()
    if type(sha256) is not str or not hmac.compare_digest(digest.encode(), sha256.encode()):
        raise ModelError(f"{beside}: does not have the SHA-256 that {path.name} states")
    return data
