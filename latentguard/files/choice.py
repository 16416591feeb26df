"""Which arrays of a file are its latents: those the operator names, or else those with names that
tools use.

All arrays of one family of names are read, because a cache of several resolutions, or of flipped
images, holds several images. Other arrays with the shape of latents are not read; beside.py finds
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from latentguard.files.beside import TEXT, channels_of, is_shape_of_latents
from latentguard.files.explain import no_latents
from latentguard.files.options import Reading

# sd-scripts: latents, latents_64x64, latents_flipped_64x64. LightningDiT: latents_flip.
# musubi: latents_1x64x64_bfloat16.
_LATENTS = re.compile(
    r"latents(_flip(ped)?)?(_[0-9]{1,6}x[0-9]{1,6})?|latents_1x[0-9]{1,6}x[0-9]{1,6}_[a-z0-9]{1,20}"
)
_MOMENTS = re.compile(r"moments(_flip(ped)?)?(_[0-9]{1,6}x[0-9]{1,6})?")
COMFYUI = "latent_tensor"
# latent_image: OneTrainer. latent_tensor: SaveLatent of ComfyUI. samples: its LATENT.
SINGLE_NAMES = ("latents", "latent", "latent_image", COMFYUI, "samples")


@dataclass(frozen=True)
class Choice:
    """The arrays that are read, by name.

    moments: whether they hold means and deviations. several: whether their names tell the images
    apart. said: whether the operator chose them, so that all others are skipped on purpose.
    """

    names: tuple[str, ...]
    moments: bool = False
    several: bool = False
    said: bool = False


def choose(
    arrays: Mapping[str, tuple[tuple[int, ...], bool]],
    reading: Reading,
    names: Iterable[str],
    needs: str,
    alone: bool = True,
) -> Choice:
    """The latents among the arrays of a file.

    Args:
        arrays: shape of each array, and whether it is of floating point numbers.
        names: every key that the file has, in order, for the error.
        needs: what the file should have, as in "the key latents".
        alone: whether the file holds nothing else but what it says of its latents.

    Raises:
        LatentsError: none of them is; it says what there is and what to do.
    """
    if reading.key is not None:
        if reading.key in arrays:
            moments = reading.moments or is_moments(reading.key)
            return Choice((reading.key,), moments, said=True)
        raise no_latents(names, (), f"{reading.key[:60]!r}, as --key says", said=True)
    for family in (_LATENTS, _MOMENTS):
        found = tuple(name for name in arrays if family.fullmatch(name))
        if found:
            moments = reading.moments or family is _MOMENTS
            return Choice(found, moments, several=len(found) > 1)
    for name in SINGLE_NAMES:
        if name in arrays:
            return Choice((name,), reading.moments)
    if alone and _are_named(arrays):
        return Choice(tuple(arrays), reading.moments, several=True)
    if len(arrays) != 1:
        floats = [name for name, (_, floating) in arrays.items() if floating]
        raise no_latents(names, floats, needs)
    return Choice(tuple(arrays), reading.moments)


def is_moments(name: str) -> bool:
    """Whether a name says that an array holds means and deviations."""
    return _MOMENTS.fullmatch(name) is not None


def _are_named(arrays: Mapping[str, tuple[tuple[int, ...], bool]]) -> bool:
    """Whether every array is the latents of an image, and its name the image's."""
    texts = any(part in name for part in TEXT for name in arrays)
    shapes = [shape for shape, _ in arrays.values()]
    return (
        len(arrays) > 1
        and not texts
        and all(floating for _, floating in arrays.values())
        and all(_is_one_image(shape) for shape in shapes)
        and len({channels_of(shape) for shape in shapes}) == 1
    )


def _is_one_image(shape: tuple[int, ...]) -> bool:
    if not 3 <= len(shape) <= 5 or not is_shape_of_latents(shape):
        return False
    return len(shape) == 3 or 1 in (shape[0], shape[1])
