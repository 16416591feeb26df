"""What travels in an exported file beside its graph, and the digest over both."""

from __future__ import annotations

import json
from typing import Any

import onnx

from latentguard.encoders import Encoder, traits
from latentguard.runtime.artifact import SCHEMA_VERSION, inner_digest
from latentguard.runtime.names import DIGEST, METADATA
from latentguard.scorer import Scorer
from latentguard.spaces import RECORDS, LatentSpace


def describe(
    scorer: Scorer,
    *,
    scaled: bool,
    precision: str,
    size: tuple[int, int] | None,
    calibration: str | None,
    first: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The metadata of an export; `size` in latent cells, None where height and width are open.

    first: name and SHA-256 of the file of a cascade's first model.
    """
    encoder = scorer.encoder
    space = LatentSpace.get(encoder.space)
    # Where nobody knows a space by its name, its file has to come along.
    own = {} if space.name in RECORDS else {"own_space": space.to_dict()}
    return own | {
        "schema_version": SCHEMA_VERSION,
        "policy": scorer.policy.to_dict(),
        "prompts": list(scorer.bank.prompts),
        "covered": list(scorer.bank.covered),
        "seen": list(scorer.bank.seen),
        "unseen_contrast": list(scorer.bank.unseen_contrast),
        "model": {"name": encoder.name, "sha256": encoder.sha256, "notes": encoder.notes},
        "space": space.name,
        "scaled": scaled,
        "channels": space.channels,
        "packed_patch": space.packed_patch,
        "dim": encoder.dim,
        "logit_scale": float(encoder.logit_scale),
        "precision": precision,
        "height": None if size is None else size[0],
        "width": None if size is None else size[1],
        "calibration": calibration,
        "merged": _merged(encoder, size),
        "files": {},
        "first": None if first is None else {"file": first[0], "sha256": first[1]},
    }


def _merged(encoder: Encoder, size: tuple[int, int] | None) -> dict[str, Any] | None:
    """How many tokens of an image merge; None where none do."""
    kind = traits(encoder)
    if not kind.variant or size is None:
        return None
    patches, left = kind.tokens_left(*size)
    return {"share": kind.merge, "tokens": patches, "left": left}


def write_metadata(model: onnx.ModelProto, metadata: dict[str, Any]) -> bytes:
    """The bytes of `model` with its metadata and the digest over everything else."""
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(metadata, sort_keys=True, allow_nan=False)
    stamp = model.metadata_props.add()
    stamp.key = DIGEST
    stamp.value = inner_digest(model.SerializeToString())
    data: bytes = model.SerializeToString()
    return data
