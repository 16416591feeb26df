"""Writing latents with everything that reading them needs to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from latentguard.atomic import replacing
from latentguard.errors import LatentsError
from latentguard.files.claims import KEYS
from latentguard.spaces import Latents

if TYPE_CHECKING:
    from torch import Tensor

_RESERVED = KEYS | {"latents"}


def save_latents(path: str | Path, latents: Latents, **metadata: Any) -> None:
    """Write latents as .pt (a dict) or .safetensors, with space, scaling, layout, size and ids.

    The file appears complete or not at all. `read_latents` and `load_latents` give the same
    latents back, to the bit.

    Args:
        path: ends in .pt, .pth or .safetensors; .npy holds numbers only and is refused.
        metadata: further keys, values of JSON's kinds (a license, say); readers ignore them.

    Raises:
        LatentsError: another suffix, a reserved key, or a value that JSON has no kind for.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise LatentsError(
            f"{target}: latents are written as .pt or .safetensors, which say what they hold"
        )
    taken = sorted(_RESERVED & metadata.keys())
    if taken:
        raise LatentsError(f"{target}: metadata {', '.join(taken)} follows from the latents")
    try:
        extra = json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise LatentsError(f"{target}: metadata must be JSON: {error}") from error
    if (
        latents.layout == "patches"
        or latents.space.packed_order != latents.space.standard.packed_order
    ):
        latents = latents.to_spatial()  # a file cannot say in which order its tokens are
    fields = {**description(latents), **extra}
    tensor = latents.tensor.detach().cpu().contiguous().clone()
    with replacing(target) as file:
        if suffix == ".safetensors":
            _save_safetensors(file, tensor, fields)
        else:
            _save_torch(file, tensor, fields)


def description(latents: Latents) -> dict[str, Any]:
    """What a file says beside these latents, of JSON's kinds: `Claims` reads it."""
    fields: dict[str, Any] = {
        "space": latents.space.name,
        "scaled": latents.scaled,
        "layout": latents.layout,
        "height": latents.height,
        "width": latents.width,
    }
    if latents.ids is not None:
        fields["ids"] = list(latents.ids)
    standard = latents.space.standard
    for key in ("scale", "shift"):
        value = getattr(latents.space, key)
        if value != getattr(standard, key):
            fields[key] = list(value) if isinstance(value, tuple) else value
    return fields


def _save_torch(file: BinaryIO, tensor: Tensor, fields: dict[str, Any]) -> None:
    import torch

    torch.save({"latents": tensor, **fields}, file)


def _save_safetensors(file: BinaryIO, tensor: Tensor, fields: dict[str, Any]) -> None:
    from safetensors.torch import save

    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
    file.write(save({"latents": tensor}, metadata=text))
