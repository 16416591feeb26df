"""Q16's published prompt embeddings, read without unpickling.

`prompts.p` is a pickle of one NumPy array, [1, 2, dim] float16. Unpickling runs whatever a file
names. Here the file's opcodes are only listed, and must be those of such an array, one by one;
then its bytes are taken.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import ModelError
from latentguard.regular import problem, read_bounded

MAX_BYTES = 1 << 20
CLASSES = 2
"""Harmless and inappropriate, in this order."""

_DTYPES = {"f2": "<f2", "f4": "<f4", "f8": "<f8"}
_MODULES = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_MEMO = ("PROTO", "BINPUT", "LONG_BINPUT", "MEMOIZE", "FRAME")


def read_prompts(path: str | Path) -> NDArray[np.float32]:
    """The embeddings [2, dim] float32 of a `prompts.p`, or of a .npy file.

    Raises ModelError for a file that is neither, or holds numbers that are not finite.
    """
    source = Path(path)
    try:
        data = read_bounded(source, MAX_BYTES)
    except OSError as error:
        raise ModelError(f"{source}: {problem(error)}") from error
    try:
        array = _npy(data) if data.startswith(b"\x93NUMPY") else _pickled(data)
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{source}: not the prompt embeddings of Q16, one array [1, 2, dim] in a pickle as "
            f"published, or in a .npy file ({error})"
        ) from error
    array = array.astype(np.float32)
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or len(array) != CLASSES or not np.isfinite(array).all():
        raise ModelError(
            f"{source}: Q16's prompts must be finite numbers [2, dim], got {list(array.shape)}"
        )
    return array


def _npy(data: bytes) -> NDArray[Any]:
    import io

    found: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    if found.dtype.kind != "f":
        raise ValueError(f"its numbers are {found.dtype}")
    return found


def _pickled(data: bytes) -> NDArray[Any]:
    opcodes = _opcodes(data)
    wanted = _Expected(opcodes)
    if wanted.one("GLOBAL") not in _MODULES or wanted.one("GLOBAL") != "numpy ndarray":
        raise ValueError("it makes something else than an array")
    wanted.all("BININT1", "TUPLE1", "SHORT_BINBYTES", "TUPLE3", "REDUCE", "MARK")
    wanted.all("BININT1")
    shape, opcode = [], ""
    while not opcode.startswith("TUPLE"):
        opcode, value = wanted.next()
        if opcode in ("BININT1", "BININT2", "BININT"):
            shape.append(int(value))
        elif opcode not in ("TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "MARK"):
            raise ValueError(f"unexpected {opcode}")
    if wanted.one("GLOBAL") != "numpy dtype":
        raise ValueError("its numbers have no type")
    dtype = np.dtype(_DTYPES[str(wanted.one("BINUNICODE"))])
    wanted.all("NEWFALSE", "NEWTRUE", "TUPLE3", "REDUCE", "MARK", "BININT1")
    if wanted.one("BINUNICODE") != "<":
        raise ValueError("its numbers are not little-endian")
    wanted.all("NONE", "NONE", "NONE", "BININT", "BININT", "BININT1", "TUPLE", "BUILD", "NEWFALSE")
    opcode, raw = wanted.next()
    if opcode not in ("BINBYTES", "SHORT_BINBYTES"):
        raise ValueError(f"unexpected {opcode}")
    wanted.all("TUPLE", "BUILD", "STOP")
    if not shape or min(shape) < 1 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"its shape {shape} does not fit its {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape)


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    for opcode, value, _ in pickletools.genops(data):
        if opcode.name not in _MEMO:
            yield opcode.name, value


class _Expected:
    """Opcodes, taken one by one."""

    def __init__(self, opcodes: Iterator[tuple[str, Any]]) -> None:
        self._opcodes = opcodes

    def next(self) -> tuple[str, Any]:
        """The next one, with its value."""
        found = next(self._opcodes, None)
        if found is None:
            raise ValueError("it ends too early")
        return found

    def one(self, name: str) -> Any:
        """The value of the next one, which must have this name."""
        opcode, value = self.next()
        if opcode != name:
            raise ValueError(f"unexpected {opcode}")
        return value

    def all(self, *names: str) -> None:
        """The next ones must have these names."""
        for name in names:
            self.one(name)
