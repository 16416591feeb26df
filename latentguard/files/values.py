"""Latents that are a value of a table: bytes of a file, bare numbers, or an array."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentsError
from latentguard.files.claims import Claims, Image, Payload, is_twofold, plan
from latentguard.files.numbers import Numbers, numbers_of
from latentguard.files.numpy_files import open_npy, open_npz
from latentguard.files.options import Reading
from latentguard.files.safetensors_files import open_safetensors
from latentguard.files.torch_files import open_torch
from latentguard.spaces import LatentSpace
from latentguard.spaces.arrays import BFLOAT16

STORED: dict[str, np.dtype[Any]] = {
    "bfloat16": BFLOAT16,
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
}
"""Types of bare numbers, by name."""

_EXPECTED = "floating point numbers"


def bytes_payload(data: bytes, claims: Claims, reading: Reading, dtype: str | None) -> Payload:
    """Bytes of a .npy, .npz, .pt or .safetensors file, or bare numbers of a type that is said.

    Args:
        dtype: of bare numbers, where the table says it; else `Reading.dtype` does.

    Raises:
        LatentsError: they are neither, or the size of bare numbers is not said.
    """
    dtype = dtype or reading.dtype
    if dtype is not None:
        shape = _said_shape(claims, reading)
        if shape is not None and math.prod(shape) * STORED[dtype].itemsize == len(data):
            numbers = np.frombuffer(data, STORED[dtype]).reshape(shape)
            return array_payload(numbers, claims, reading)
    stream, size = io.BytesIO(data), len(data)
    if data.startswith(b"\x93NUMPY"):
        return open_npy(stream, size, claims, reading)
    if data.startswith(b"PK\x03\x04"):
        opener = open_torch if b"/data.pkl" in data[:300] else open_npz
        return opener(stream, size, claims, reading)
    if data.startswith(b"\x1f\x8b"):
        return open_torch(stream, size, claims, reading)
    if data[8:9] == b"{":
        return open_safetensors(stream, size, claims, reading)
    if dtype is None:
        raise LatentsError(
            f"its {size} bytes are not a .npy, .npz, .pt or .safetensors file: if they are bare "
            "numbers, say --dtype, --space, --height and --width"
        )
    raise LatentsError(
        f"its {size} bytes do not fit {dtype} numbers of the given space, height and width "
        f"({_shown(_said_shape(claims, reading))})"
    )


def array_payload(array: NDArray[Any], claims: Claims, reading: Reading) -> Payload:
    """An array in memory, of `BFLOAT16` or a type of NumPy's."""
    return _payload(array, numbers_of(array.dtype, reading, _EXPECTED), claims, reading)


def shaped(
    numbers: NDArray[Any], shape: tuple[int, ...] | None, claims: Claims, reading: Reading
) -> NDArray[Any]:
    """A flat list of numbers as an array: of the shape that its row gives, or that is said.

    Raises LatentsError where nothing says it, or there are not as many numbers.
    """
    shape = _said_shape(claims, reading) if shape is None else shape
    if shape is None:
        raise LatentsError(
            f"{len(numbers)} numbers have no shape: say --space, --height and --width, or keep "
            "the shape in a column named shape"
        )
    if math.prod(shape) != len(numbers):
        raise LatentsError(f"{len(numbers)} numbers are not of shape {_shown(shape)}")
    return numbers.reshape(shape)


def _payload(array: NDArray[Any], numbers: Numbers, claims: Claims, reading: Reading) -> Payload:
    layout = plan(array.shape, claims, reading.moments)

    def images() -> Iterator[Image | LatentsError]:
        rows = array.reshape(layout.count, *layout.stored)
        for row in rows:
            yield numbers.latents(row[: layout.shape[0]])

    return Payload(claims, images, not layout.moments and is_twofold(array.shape))


def _said_shape(claims: Claims, reading: Reading) -> tuple[int, ...] | None:
    """The shape of one image by its space and size, None where they are not said."""
    space = reading.space
    if space is None and claims.space is not None:
        space = LatentSpace.get(claims.space)
    if space is None:
        return None
    height, width = claims.size(space)
    if height is None or width is None:
        return None
    layout = claims.layout
    if layout == "packed":
        return height * width // space.packed_patch**2, space.packed_channels
    if layout == "patches":
        patch = space.packed_patch
        return space.packed_channels, height // patch, width // patch
    return space.channels * (2 if reading.moments else 1), height, width


def _shown(shape: tuple[int, ...] | None) -> str:
    return "which are not all said" if shape is None else str(list(shape))
