"""Pictures as examples: each is encoded once, and its latents are kept for the next time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from latentguard.adapt.autoencoders import Autoencoder, load_autoencoder
from latentguard.adapt.images import center_crop, find_images
from latentguard.encoders.catalog import cache_dir
from latentguard.errors import LatentsError
from latentguard.files import load_latents, save_latents
from latentguard.learn.examples import Named
from latentguard.regular import open_regular, problem, sha256_of

SIZE = 256
"""Pixels per side of the largest centered square, by default."""


class Pictures:
    """Reads pictures as latents.

    Args:
        autoencoder: as `load_autoencoder` takes it. It is loaded for the first picture that was not
            encoded before.
        space: where the autoencoder leaves it open.
        size: pixels per side, a multiple of 8.
        cache: a folder for latents; None is that of the package.

    Raises LatentsError for a size that cannot be.
    """

    def __init__(
        self,
        autoencoder: Path,
        space: str | None = None,
        size: int = SIZE,
        cache: Path | None = None,
    ) -> None:
        if size < 64 or size % 8:
            raise LatentsError(f"the size must be a multiple of 8 and at least 64, got {size}")
        self._source, self._space, self._size = autoencoder, space, size
        self._cache = (cache or cache_dir() / "pictures") / f"{self._digest()[:16]}-{size}"
        self._loaded: Autoencoder | None = None

    def _digest(self) -> str:
        """Of the autoencoder's files and the space that it is said to have."""
        root = self._source
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        digest = hashlib.sha256(repr(self._space).encode())
        for file in files:
            if file.is_file():
                digest.update(f"{file.relative_to(root)}\0{_sha256(file)}\n".encode())
        return digest.hexdigest()

    def read(self, folders: Sequence[str | Path]) -> Iterator[Named]:
        """The pictures of files and folders, sorted. Raises LatentsError where there are none, or
        one cannot be read."""
        for path in find_images(folders):
            kept = self._cache / f"{_sha256(path)}.safetensors"
            with suppress(LatentsError):
                yield Named(str(path), replace(load_latents(kept), ids=None))
                continue
            try:
                pixels = center_crop(path, self._size)
            except (OSError, ValueError) as error:
                raise LatentsError(
                    f"{path}: is not a picture that can be read ({error})"
                ) from error
            if self._loaded is None:
                self._loaded = load_autoencoder(self._source, self._space)
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
            latents = self._loaded.encode(image)
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_latents(kept, latents)
            yield Named(str(path), latents)


def _sha256(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return sha256_of(file)
    except OSError as error:
        raise LatentsError(f"{path}: {problem(error)}") from error
