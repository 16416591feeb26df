"""Latents of pictures that were encoded before, one file each, by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from latentguard.encode.framing import Box
from latentguard.files import save_latents
from latentguard.spaces import Latents

_VERSION = 1
"""Of how pictures are decoded, framed and encoded: another one has latents of its own."""


@dataclass(frozen=True)
class Kept:
    """tensor: latents [1, C, h, w]. width, height, box: as of `Encoded`."""

    tensor: Tensor
    width: int
    height: int
    box: Box


class Cache:
    """A folder of latents files, each of which `latentguard scan` reads by itself.

    A file's name is a SHA-256 of the picture's bytes, the autoencoder's weights, the size, crop,
    mode and precision. Several processes may share the folder: a file appears whole or not at all.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, picture: str, said: Mapping[str, Any]) -> Path:
        """The file of a picture, by the SHA-256 of its bytes and `How.said`."""
        text = json.dumps([_VERSION, picture, said], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, picture: str, said: Mapping[str, Any]) -> Kept | None:
        """What is kept of a picture; None where there is nothing, or a damaged file."""
        from safetensors import SafetensorError, safe_open

        path = self.path(picture, said)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                found = json.loads(file.metadata()["picture"])
                tensor = file.get_tensor("latents")
            left, top, right, bottom = map(float, found["box"])
            return Kept(
                tensor, int(found["width"]), int(found["height"]), (left, top, right, bottom)
            )
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return None

    def put(self, picture: str, said: Mapping[str, Any], kept: Kept, latents: Latents) -> None:
        """Keep a picture's latents under its name. Raises OSError where the disk is full."""
        path = self.path(picture, said)
        path.parent.mkdir(parents=True, exist_ok=True)
        box = [float(side) for side in kept.box]
        save_latents(
            path,
            latents,
            picture={"width": kept.width, "height": kept.height, "box": box},
            encoded=dict(said),
        )
