"""Another policy for an exported file, without exporting the model again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from latentguard.atomic import replacing_all
from latentguard.encoders import Encoder, load_encoder, needs_space
from latentguard.encoders.examples import widened
from latentguard.errors import ModelError, PolicyError
from latentguard.export.graph import attach_bank
from latentguard.export.metadata import describe
from latentguard.export.write import digest_of, first_name, write
from latentguard.policy import Policy, load_policy
from latentguard.runtime import Guard
from latentguard.runtime.artifact import Artifact, open_artifact
from latentguard.scorer import Scorer
from latentguard.spaces import LatentSpace


def swap_policy(
    source: str | Path,
    policy: Policy | str | Path,
    out: str | Path,
    model: Encoder | str | Path | None = None,
    *,
    sha256: str | None = None,
) -> str:
    """Write `source` with another policy to `out`; the SHA-256 of the new file.

    With a `cascade` in the policy the file of the first model is written, too, beside `out`.

    model: the model of `source`, which embeds the prompts; None takes it by its name. The first
    model of a cascade is the policy's.
    sha256: the pinned digest of `source`.

    A latent space of one's own, which `source` carries, is known by its name afterward.

    Raises ModelError where `source` is not an export, or `model` is not the one in it (another
    name, digest or dimension), or the policy has a cascade whose first model `source` lacks, or
    views that it does not read; PolicyError for a policy that cannot be used.
    """
    artifact = open_artifact(source, sha256)
    before = artifact.metadata
    if before["own_space"] is not None:
        LatentSpace.of(LatentSpace.from_dict(before["own_space"]))  # known by its name from here on
    name = before["model"]["name"]
    encoder = model if isinstance(model, Encoder) else _encoder(model or name, before["space"])
    if before["dim"] == widened(encoder).dim:
        # A file that has a place for what was learned from examples takes prompts there, too.
        encoder = widened(encoder)
    _check_model(artifact, encoder)
    rules = load_policy(policy)
    if rules.space not in (None, before["space"]):
        raise PolicyError(f"policy '{rules.name}' is for {rules.space}, not {before['space']}")
    scorer, out = Scorer(rules, encoder), Path(out)
    if scorer.encoder.dim != before["dim"]:
        raise ModelError(
            f"{source}: was exported for policies of prompts alone, and policy '{rules.name}' has "
            "concepts that were learned from examples: export it anew with this policy"
        )
    if scorer.thorough is not scorer:
        raise ModelError(
            f"{source}: reads images whole, and policy '{rules.name}' asks for views: "
            f"{rules.views}: export it anew with this policy"
        )
    if scorer.first is not None and artifact.first is None:
        raise ModelError(
            f"{source}: has no first model, which policy '{rules.name}' asks for by its cascade: "
            "export it anew with this policy"
        )
    with replacing_all(out.parent) as (folder, files):
        first: Path | None = None
        if scorer.first is not None and artifact.first is not None:
            _check_model(artifact.first, scorer.first.encoder)
            first = folder / first_name(out)
            files += _swapped(artifact.first, scorer.first, first)
        main = _swapped(artifact, scorer, folder / out.name, first)
        with Guard(main[0], providers=["CPUExecutionProvider"]) as guard:
            size = (before["height"] or 32, before["width"] or 32)
            found = guard.scores(np.ones((1, before["channels"], *size), np.float32))["margin"]
            if found.shape != (1, len(rules.concepts)):
                raise ModelError(
                    f"{out}: not written, the new bank gives scores {list(found.shape)}"
                )
            digest = guard.sha256
        files[:0] = main
    return digest


def _encoder(name: str | Path, space: str) -> Encoder:
    return load_encoder(name, "cpu", space if needs_space(name) else None)


def _check_model(artifact: Artifact, encoder: Encoder) -> None:
    """Raise ModelError where a file was exported from another model."""
    name, digest = artifact.metadata["model"]["name"], artifact.metadata["model"]["sha256"]
    dim = artifact.metadata["dim"]
    if (encoder.name, encoder.sha256, encoder.dim) != (name, digest, dim):
        raise ModelError(
            f"{artifact.path}: was exported from {name} ({digest[:12]}, {dim} dimensions), and "
            f"cannot take a bank of {encoder.name} ({encoder.sha256[:12]}, {encoder.dim})"
        )


def _swapped(
    artifact: Artifact, scorer: Scorer, path: Path, first: Path | None = None
) -> list[Path]:
    """The files of `artifact` with the policy of `scorer`, at `path`, which comes first.

    first: the file of the cascade's first model, beside `path`.
    """
    before = artifact.metadata
    graph = _graph(artifact)
    attach_bank(graph, scorer)
    metadata = describe(
        scorer,
        scaled=before["scaled"],
        precision=before["precision"],
        size=None if before["height"] is None else (before["height"], before["width"]),
        calibration=before.get("calibration"),
        first=None if first is None else (first.name, digest_of(first)),
    )
    return write(graph, metadata, path)


def _graph(artifact: Artifact) -> onnx.ModelProto:
    """The bytes that were looked at, with the numbers of the files beside them; no path is read."""
    graph = onnx.load_from_string(artifact.data)
    for tensor in graph.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        data = artifact.external[entries["location"]]
        try:
            begin = int(entries.get("offset", 0))
            end = begin + int(entries["length"]) if "length" in entries else len(data)
        except ValueError as error:
            raise ModelError(
                f"{artifact.path}: {tensor.name} lies at no place in {entries['location']}"
            ) from error
        if not 0 <= begin <= end <= len(data):
            raise ModelError(
                f"{artifact.path}: {tensor.name} lies outside of {entries['location']}"
            )
        tensor.raw_data = data[begin:end]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return graph
