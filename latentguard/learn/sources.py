"""Paths to examples: files of latents, and pictures where it is said what encodes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from latentguard.adapt.images import SUFFIXES as PICTURES
from latentguard.encoders import Encoder, best_encoder, load_encoder, needs_space
from latentguard.errors import LatentsError
from latentguard.files import SUFFIXES, Reading
from latentguard.learn.examples import Named, of_files
from latentguard.learn.pictures import Pictures


def images(
    paths: Sequence[str | Path], reading: Reading, pictures: Pictures | None
) -> Iterator[Named]:
    """Every image of the paths, in their order.

    Raises LatentsError for what cannot be read, and for pictures where nothing encodes them.
    """
    for path in paths:
        if not _shows_pictures(Path(path)):
            yield from of_files([path], reading)
        elif pictures is not None:
            yield from pictures.read([path])
        else:
            raise LatentsError(
                f"{path}: holds pictures, not latents: say what encodes them (--autoencoder)"
            )


def _shows_pictures(path: Path) -> bool:
    """Raises LatentsError for a folder that holds both, of which one would be passed over."""
    if not path.is_dir():
        return path.suffix.lower() in PICTURES
    suffixes = {file.suffix.lower() for file in path.rglob("*")}
    shown = bool(suffixes & set(PICTURES))
    if shown and suffixes & set(SUFFIXES):
        raise LatentsError(
            f"{path}: holds pictures and latents: give a folder of one kind, or the files"
        )
    return shown


def known_space(found: Iterator[Named], side: str) -> tuple[str, Iterator[Named]]:
    """The latent space of the first image, and all of them. LatentsError where there are none."""
    first = next(found, None)
    if first is None:
        raise LatentsError(f"there are no {side} in what was given")
    return first.latents.space.name, chain([first], found)


def encoder_for(model: str, space: str, device: str | None = None) -> Encoder:
    """A model by its name, or "auto": the best one for a space. Raises ModelError."""
    if model == "auto":
        model = best_encoder(space)
    return load_encoder(model, device, space if needs_space(model) else None)
