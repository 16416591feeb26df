"""Negatives for whoever has none: vectors of everyday photos, shipped with the package.

A file holds what one model sees of some hundred photos of Caltech-101 (Li, Andreeto, Ranzato and
Perona 2022, CC BY 4.0), in 8 bits a number. `scripts/make_background.py` makes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentguard.encoders import Encoder
from latentguard.errors import ModelError
from latentguard.regular import open_regular, read_whole

FORMAT = "latentguard-background"
FOLDER = Path(__file__).parent / "background"


@dataclass(frozen=True, eq=False)
class Background:
    """What a model sees of photos of everyday things.

    rows: [n, F] float32, unit norm. joint: [dim] float32, the mean of their embeddings.
    names: n, the photos' names in Caltech-101. about: where they are from, for people.
    size: (height, width) of their latents in cells.
    """

    rows: NDArray[np.float32]
    joint: NDArray[np.float32]
    names: tuple[str, ...]
    about: str
    size: tuple[int, int] = (32, 32)


def find_background(model: str, sha256: str, space: str) -> Background:
    """The background of a model. Raises ModelError where the package has none for it."""
    import safetensors.numpy

    path = FOLDER / f"{model}-{space}.safetensors"
    if not path.is_file():
        raise ModelError(_missing(model, sha256, space))
    with open_regular(path) as file:
        data = read_whole(file)
    tensors = safetensors.numpy.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    said = json.loads(header["__metadata__"]["latentguard"])
    if said["model_sha256"] != sha256:
        raise ModelError(_missing(model, sha256, space))
    rows = tensors["low"] + tensors["step"] * tensors["rows"].astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Background(rows, tensors["joint"], tuple(said["names"]), said["about"])


def save_background(
    path: Path,
    encoder: Encoder,
    rows: NDArray[np.float32],
    joint: NDArray[np.float32],
    names: list[str],
    about: str,
) -> None:
    """Write a background: rows [n, F] in 8 bits, each column between its smallest and largest."""
    import safetensors.numpy

    from latentguard.atomic import replacing

    low = rows.min(0)
    step = np.maximum((rows.max(0) - low) / 255, 1e-12).astype(np.float32)
    said = {
        "format": FORMAT,
        "model": encoder.name,
        "model_sha256": encoder.sha256,
        "space": encoder.space,
        "names": names,
        "about": about,
    }
    tensors = {
        "rows": np.rint((rows - low) / step).astype(np.uint8),
        "low": low,
        "step": step,
        "joint": joint,
    }
    with replacing(path) as file:
        file.write(safetensors.numpy.save(tensors, {"latentguard": json.dumps(said)}))


def _missing(model: str, sha256: str, space: str) -> str:
    known = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    return (
        f"the package has no negatives for {model} ({sha256[:12]}) on {space} latents, only for "
        f"{' and '.join(known) or 'no model'}: give latents that do not show the concept "
        "(--negatives)"
    )
