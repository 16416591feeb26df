"""Policies from names and files; every error is one sentence with file, line and key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentguard.errors import PolicyError
from latentguard.policy.lock import Lock, lock_path, parse_lock
from latentguard.policy.models import BlockSettings, Policy
from latentguard.policy.picture import read_picture
from latentguard.policy.problems import closest, validate
from latentguard.policy.shipped import shipped_files
from latentguard.yaml_nodes import Node, clip, compose, line_of, problems_error, read_bytes, show


def parse_policy(
    data: bytes | str,
    source: str = "policy",
    lock: bytes | None = None,
    lock_source: str = "lock",
    folder: str | Path = "",
) -> Policy:
    """A policy from the text of its YAML file, and of its lock file where there is one.

    source, lock_source: the names of the two in messages. folder: where the files lie that it
    names: examples, and the placeholder of `on_block`.
    Raises PolicyError: one sentence with name, line and key for each thing that is wrong.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    root = compose(raw, source)
    policy = validate(Policy, root, source, "a policy")
    policy._folder = Path(folder)
    parts = [raw, *([] if lock is None else [lock]), *_learned(policy, raw, source)]
    policy._picture = _picture(policy, root, source)
    if policy.picture is not None:
        parts.append(hashlib.sha256(policy.picture).hexdigest().encode("ascii"))
    policy._file_sha256 = hashlib.sha256(b"\0".join(parts)).hexdigest()
    if lock is not None:
        policy._lock = parse_lock(lock, lock_source)
        _check_calibration(policy, policy._lock, lock, lock_source)
    return policy


def _picture(policy: Policy, root: Node, source: str) -> bytes | None:
    """The bytes of the placeholder, which has to be a picture that can be shown."""
    named = policy.on_block.placeholder if isinstance(policy.on_block, BlockSettings) else None
    if named is None:
        return None
    try:
        return read_picture(policy._folder / named)
    except PolicyError as error:
        line = line_of(root, ["on_block", "placeholder"])
        sentence = f"on_block.placeholder {show(named)}: {error}"
        raise problems_error(source, [(line, sentence)]) from error


def _learned(policy: Policy, data: bytes, source: str) -> list[bytes]:
    """The digests of the files of examples, which are read now: what is loaded is complete."""
    digests = []
    for index, concept in enumerate(policy.concepts):
        try:
            file = policy.examples_of(concept)
            labels = [text.casefold() for text in policy.labels_of(concept)]
            if len(set(labels)) < len(labels) and file and file.label.casefold() in labels[:-1]:
                raise PolicyError(
                    f"it is called '{file.name}', and '{file.label}' is a prompt, too"
                )
        except PolicyError as error:
            place: list[int | str] = ["concepts", index, "examples"]
            problem = f"concepts[{index}].examples: {error}"
            raise problems_error(
                source, [(line_of(compose(data, source), place), problem)]
            ) from error
        if file is not None:
            digests.append(file.sha256.encode("ascii"))
    return digests


def _check_calibration(policy: Policy, lock: Lock, data: bytes, source: str) -> None:
    """Refuse margins of prompts that have changed since: they belong to other scores."""
    concepts = {c.id: c for c in policy.concepts if c.threshold.kind == "fpr"}
    stale = [
        (index, entry)
        for index, entry in enumerate(lock.entries)
        if entry.concept in concepts
        and entry.prompts_sha256 != policy.prompts_sha256(concepts[entry.concept])
    ]
    if stale:
        root = compose(data, source)
        raise problems_error(
            source,
            [
                (
                    line_of(root, ["entries", index]),
                    f"entries[{index}] was calibrated with other prompts, contrast prompts or "
                    f"templates of '{entry.concept}'; calibrate it again or remove the entry",
                )
                for index, entry in stale
            ],
        )


def load_policy(name_or_path: str | Path | Policy, *, use_lock: bool = True) -> Policy:
    """A policy by the name of a shipped one ("default") or by the path of its YAML file.

    A shipped name takes precedence over a file of that name; write ./default to mean the file. A
    Policy is returned as it is. NAME.lock.yaml next to the file is read with it, and so is the
    placeholder that it names. `use_lock=False` leaves the lock out, which calibration does to read
    a policy whose lock is out of date.
    Raises PolicyError: one sentence with file, line and key for each thing that is wrong.
    """
    if isinstance(name_or_path, Policy):
        return name_or_path
    path = _find(name_or_path)
    data = read_bytes(path)
    lock = lock_path(path)
    return parse_policy(
        data,
        str(path),
        read_bytes(lock) if use_lock and lock.exists() else None,
        str(lock),
        path.parent,
    )


def _find(name_or_path: str | Path) -> Path:
    shipped = shipped_policies()
    if isinstance(name_or_path, str) and name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    text = str(name_or_path)
    try:
        is_name = path.name == text and not path.suffix and not path.exists()
    except (OSError, ValueError) as error:
        raise PolicyError(f"{clip(text)}: cannot be read: {error}") from error
    if is_name:
        near = closest(text, shipped)
        hint = f"did you mean '{near}'? " if near else ""
        raise PolicyError(
            f"no policy is named '{clip(text)}'; {hint}"
            f"these ship: {', '.join(shipped) or 'none'}; any other is given by its file's path"
        )
    return path


def lines_of(
    name_or_path: str | Path, places: Sequence[Sequence[int | str]]
) -> list[tuple[str, int]]:
    """The file of a policy and the line in it of each place, such as ("concepts", 0, "prompts").

    Raises PolicyError where the file cannot be read.
    """
    path = _find(name_or_path)
    root = compose(read_bytes(path), str(path))
    return [(str(path), line_of(root, place)) for place in places]


def shipped_policies() -> dict[str, Path]:
    """The policies that come with latentguard, by name."""
    return shipped_files()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of policy files, for editors. What it cannot say (unique ids, contrast
    prompts that differ from the prompts) is left to `load_policy`."""
    schema = _tidied(Policy.model_json_schema())
    # Draft 7 is what YAML editors implement best; nothing newer is used.
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "latentguard policy",
        **schema,
    }


def _tidied(schema: Any) -> Any:
    """Without generated titles, line breaks in descriptions, and what stands for a key that is left
    out and may not be written so (null, an empty list)."""
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidy: dict[str, Any] = {}
    left_out: tuple[Any, ...] = (None, []) if schema.get("minItems") else (None,)
    for key, value in schema.items():
        if key == "anyOf" and {"type": "null"} in value and len(value) == 2:
            tidy |= _tidied(next(option for option in value if option != {"type": "null"}))
        elif key == "description" and isinstance(value, str):
            tidy[key] = " ".join(value.split())
        elif not (key == "title" and isinstance(value, str)) and not (
            key == "default" and value in left_out
        ):
            tidy[key] = _tidied(value)
    return tidy
