"""What the differential fuzz of every format shares: compare our reading with the library's."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.claims import KEYS, Claims, Payload
from latentguard.spaces import SPACES
from latentguard.spaces.arrays import widened

CHANNELS = {space.channels for space in SPACES.values()}

Library = Callable[[bytes], tuple[Any, dict[str, Any]]]
"""Bytes of a file to its latents (an array, or a list of them) and what it says besides."""

Opener = Callable[[io.BytesIO, int, Claims], Payload]


def compared(
    counts: Counter[str], label: str, data: bytes, opener: Opener, library: Library
) -> None:
    """Count one structure as read, refused or disagreed; the last is printed, too.

    `read` means that every image that we read is bit for bit the library's, in number, order and
    dtype, and that the keys are the same. A file that the library refuses must be refused.
    """
    counts["tried"] += 1
    try:
        payload = opener(io.BytesIO(data), len(data), Claims())
        ours = list(payload.images())
    except LatentsError:
        counts["refused"] += 1
        return
    if all(isinstance(image, LatentsError) for image in ours):
        counts["refused"] += 1
        return
    try:
        problem = _difference(ours, payload.claims, *library(data))
    except Exception as error:  # whatever the library raises, it hands nothing out
        problem = f"the library refuses it ({type(error).__name__}: {str(error)[:100]})"
    if problem is None:
        counts["read"] += 1
    else:
        counts["disagreed"] += 1
        print(f"disagreement: {label}: {problem}")


def chosen(arrays: dict[str, tuple[tuple[int, ...], bool]]) -> list[str]:
    """Which arrays of a file hold its latents, by the rules of docs/latents.md.

    arrays: shape of each, and whether it is of floating point numbers.
    """
    for name in ("latents", "samples"):
        if name in arrays:
            return [name]
    if len(arrays) < 2:
        return list(arrays)
    shapes = [shape for shape, _ in arrays.values()]
    assert all(floating for _, floating in arrays.values()), "other arrays beside the latents"
    assert {len(shape) for shape in shapes} <= {3, 4}, "arrays of another form"
    assert all(len(shape) == 3 or shape[0] == 1 for shape in shapes), "several images in one array"
    assert len({shape[-3] for shape in shapes}) == 1, "arrays of several spaces"
    return sorted(arrays)


def _difference(ours: list[Any], claims: Claims, theirs: Any, says: dict[str, Any]) -> str | None:
    arrays = theirs if isinstance(theirs, (list, tuple)) else [theirs]
    rest = list(ours)
    for number, array in enumerate(arrays):
        # Every structure here has three or four axes, and one error for an array as a whole.
        images = array.astype(array.dtype.newbyteorder("="))
        # [C, 1, H, W] has an axis of one frame, where C is a space's number of channels.
        if array.ndim == 4 and array.shape[1] == 1 and array.shape[0] in CHANNELS:
            images = images[:, 0]
        images = images if images.ndim == 4 else images[None]
        if rest and isinstance(rest[0], LatentsError):
            rest.pop(0)
            continue
        mine = [widened(image) for image in rest[: len(images)]]
        del rest[: len(images)]
        shapes = [(image.dtype.str, image.shape) for image in mine]
        if shapes != [(image.dtype.str, image.shape) for image in images]:
            return f"array {number} is read as {shapes[:3]}, not {array.dtype} {array.shape}"
        if any(m.tobytes() != o.tobytes() for m, o in zip(mine, images, strict=True)):
            return f"array {number} has other numbers"
    if rest:
        return f"{len(rest)} more images are read than the library has"
    known = Claims.parse({key: says[key] for key in KEYS & says.keys()})
    return None if known == claims else f"says {claims}, not {known}"


def compared_rows(
    counts: Counter[str],
    label: str,
    data: bytes,
    ours: Callable[[bytes], Iterable[Any]],
    library: Callable[[bytes], list[Any]],
) -> None:
    """Count one table as read, refused or disagreed; the last is printed, too.

    `read` means as many rows as the library has, and each array that we read bit for bit its own. A
    row that we have an error for may be anything there; None stands for it.
    """
    counts["tried"] += 1
    try:
        mine = list(ours(data))
    except LatentsError:
        counts["refused"] += 1
        return
    try:
        theirs = library(data)
    except Exception as error:  # then every row must be an error here
        theirs = [f"{type(error).__name__}: {error}"] * len(mine)
    alike = len(mine) == len(theirs) and all(
        one is None
        or (
            isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and one.tobytes() == other.tobytes()
        )
        for one, other in zip(mine, theirs, strict=True)
    )
    if not alike:
        print(f"disagreement: {label}")
    counts["read" if alike else "disagreed"] += 1
