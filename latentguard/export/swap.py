"""Another policy for an exported file, without exporting the model again."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx

from latentguard.concepts import ConceptBank
from latentguard.encoders import Encoder, load_encoder
from latentguard.errors import ModelError, PolicyError
from latentguard.export.graph import attach_bank
from latentguard.export.metadata import describe
from latentguard.export.write import write
from latentguard.policy import Policy, load_policy
from latentguard.runtime import Guard
from latentguard.runtime.artefact import open_artefact
from latentguard.scorer import Scorer


def swap_policy(
    source: str | Path,
    policy: Policy | str | Path,
    out: str | Path,
    model: Encoder | str | Path | None = None,
    *,
    sha256: str | None = None,
) -> str:
    """Write `source` with another policy to `out`; the SHA-256 of the new file.

    model: the model of `source`, which embeds the prompts; None takes it by its name.
    sha256: the pinned digest of `source`.

    Raises ModelError where `source` is not an export, or `model` is not the one in it (another
    name, digest or dimension), PolicyError for a policy that cannot be used.
    """
    artefact = open_artefact(source, sha256)
    before = artefact.metadata
    name, digest = before["model"]["name"], before["model"]["sha256"]
    encoder = model if isinstance(model, Encoder) else load_encoder(model or name, "cpu")
    if (encoder.name, encoder.sha256, encoder.dim) != (name, digest, before["dim"]):
        raise ModelError(
            f"{source}: was exported from {name} ({digest[:12]}, {before['dim']} dimensions), and "
            f"cannot take a bank of {encoder.name} ({encoder.sha256[:12]}, {encoder.dim})"
        )
    rules = load_policy(policy)
    if rules.space not in (None, before["space"]):
        raise PolicyError(f"policy '{rules.name}' is for {rules.space}, not {before['space']}")
    scorer = Scorer(rules, encoder)
    assert isinstance(scorer.bank, ConceptBank)
    graph = onnx.load(artefact.path)
    attach_bank(graph, scorer)
    size = None if before["height"] is None else (before["height"], before["width"])
    metadata = describe(
        scorer,
        scaled=before["scaled"],
        precision=before["precision"],
        size=size,
        calibration=before.get("calibration"),
    )
    out = Path(out)
    with tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as folder:
        files = write(graph, metadata, Path(folder, out.name))
        with Guard(files[0], providers=["CPUExecutionProvider"]) as guard:
            shape = (1, before["channels"], *(size or (32, 32)))
            found = guard.scores(np.ones(shape, np.float32))["margin"].shape
            if found != (1, len(rules.concepts)):
                raise ModelError(f"{out}: not written, the new bank gives scores {list(found)}")
        for file in reversed(files):
            os.replace(file, out.parent / file.name)
    return hashlib.sha256(out.read_bytes()).hexdigest()
