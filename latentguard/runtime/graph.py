"""What the graph of an exported file must have, and what it must not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentguard.errors import ModelError
from latentguard.runtime.names import BANK, STANDARD
from latentguard.runtime.wire import Message

_EXTERNAL = {"location", "offset", "length", "checksum"}


def check_graph(
    path: Path, graph: Message, metadata: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """The names of the inputs and of the outputs.

    Raises ModelError, naming the file at `path`, for operators of other sets, for numbers in files
    that the metadata do not list, and for a concept bank of another policy or model.
    """
    for node in graph.get("node", []):
        _check_node(path, node)
    initial: set[str] = set()
    bank: dict[str, list[int]] = {}
    for tensor in graph.get("initializer", []):
        _check_external(path, tensor, metadata["files"])
        name = tensor.get("name", "")
        if name in initial:
            raise ModelError(f"{path}: holds the initializer {name!r} twice")
        initial.add(name)
        if name in BANK:
            bank[name] = tensor.get("dims", [])
    _check_bank(path, bank, metadata)
    inputs = [value.get("name", "") for value in graph.get("input", [])]
    outputs = [value.get("name", "") for value in graph.get("output", [])]
    return [name for name in inputs if name not in initial], outputs


def _check_node(path: Path, node: Message) -> None:
    domain = node.get("domain", "")
    if domain not in STANDARD:
        raise ModelError(
            f"{path}: has an operator of the operator set {domain!r}; only standard ONNX operators "
            "are run"
        )
    for attribute in node.get("attribute", []):
        single = [attribute["t"]] if "t" in attribute else []
        for tensor in [*single, *attribute.get("tensors", [])]:
            # The bytes of files are given to ONNX Runtime for initializers only; for others it
            # would open a path.
            _check_external(path, tensor, {})


def _check_external(path: Path, tensor: Message, listed: dict[str, Any]) -> None:
    """The numbers of a tensor are in this file, or in one that is listed."""
    entries: dict[str, str] = {}
    for entry in tensor.get("external_data", []):
        key, value = entry.get("key", ""), entry.get("value", "")
        if key not in _EXTERNAL or key in entries:
            raise ModelError(f"{path}: refers to external data by {key!r}, or by it twice")
        if key == "location" and value not in listed:
            raise ModelError(
                f"{path}: refers to external data {value!r}, which its metadata do not list"
            )
        entries[key] = value
    if tensor.get("data_location", 0) == 1 and "location" not in entries:
        raise ModelError(f"{path}: refers to external data without a location")


def _check_bank(path: Path, bank: dict[str, list[int]], metadata: dict[str, Any]) -> None:
    """The bank is of this policy and this model, as far as sizes tell."""
    prompts, concepts = len(metadata["prompts"]), len(metadata["covered"])
    dim = metadata["dim"]
    embeddings, segments, contrast, ranges = (bank.get(name, []) for name in BANK)
    fits = (
        embeddings == [prompts, dim]
        and segments == ranges == [concepts, 2]
        and contrast[1:] == [dim]
    )
    if not fits:
        raise ModelError(
            f"{path}: its concept bank must hold {prompts} prompts of {concepts} concepts in {dim} "
            f"dimensions, as its metadata say, and holds arrays {embeddings}, {segments}, "
            f"{contrast}, {ranges}"
        )
