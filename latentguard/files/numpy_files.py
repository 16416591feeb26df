""".npy and .npz: headers are checked against the file's size, images are read one by one."""

from __future__ import annotations

import ast
import io
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.beside import Beside
from latentguard.files.bounds import (
    MAX_AXES,
    MAX_BESIDE,
    MAX_GATHERED,
    MAX_INFLATED,
    MAX_METADATA,
    MAX_NPY_HEADER,
    MAX_RATIO,
    MIN_INFLATED,
)
from latentguard.files.choice import Choice, choose
from latentguard.files.claims import KEYS, Claims, Image, Payload, Plan, is_twofold, plan
from latentguard.files.numbers import Numbers, numbers_of
from latentguard.files.options import NOTHING_SAID, Reading
from latentguard.files.passed_over import HEAD, could_hold_latents
from latentguard.files.signatures import check_start, kind_of
from latentguard.files.streams import read_exactly
from latentguard.files.zip_archive import DEFLATED, STORED, Entry, entry_stream, read_archive

_EXPECTED = "float16, float32 or float64"
_MAGIC = b"\x93NUMPY"
_CLAIM_KINDS = "bUiuf"


def open_npy(
    stream: BinaryIO, size: int, claims: Claims, reading: Reading = NOTHING_SAID
) -> Payload:
    """A .npy file; it carries nothing but numbers, so `claims` come from elsewhere."""
    check_start(stream, size, "a file of numpy.save")
    header = _header(stream, size, reading)
    layout = plan(header.shape, claims, reading.moments)

    def images() -> Iterator[Image | LatentsError]:
        stream.seek(header.start)
        return _images(stream, header, layout)

    return Payload(claims, images, not layout.moments and is_twofold(header.shape))


def open_npz(
    stream: BinaryIO, size: int, claims: Claims, reading: Reading = NOTHING_SAID
) -> Payload:
    """An .npz: the arrays that are latents by their names (choice.py), and the known keys."""
    check_start(stream, size, "a file of numpy.savez")
    start = stream.read(8)
    if start[:4] != b"PK\x03\x04":
        # numpy.load looks at the first bytes alone.
        kind = kind_of(start)
        found = f", it is {kind}" if kind else ", or is truncated"
        raise LatentsError(f"is not a zip archive of numpy.savez{found}")
    entries: dict[str, Entry] = {}
    for entry in read_archive(stream, size):
        name = entry.name.removesuffix(".npy")
        if name in entries:
            raise LatentsError(f"is a damaged .npz: it holds {name[:60]!r} twice")
        entries[name] = _checked(entry)
    values = {name: _small(stream, entries[name]) for name in KEYS & entries.keys()}
    claims = Claims.parse(values, pixels=reading.pixels).merged(
        claims, "the file", "the metadata next to it"
    )
    choice = _choice(stream, entries, reading)
    arrays: list[tuple[Entry, _Header, Plan]] = []
    for name in choice.names:
        entry = entries[name]
        header = _header(entry_stream(stream, entry), entry.size, reading)
        arrays.append((entry, header, plan(header.shape, claims, choice.moments)))

    def images() -> Iterator[Image | LatentsError]:
        for entry, header, layout in arrays:
            member = entry_stream(stream, entry)
            read_exactly(member, header.start)
            yield from _images(member, header, layout)

    others = {name: e for name, e in entries.items() if name not in {*KEYS, *choice.names}}
    counts = [(name, a[2].count) for name, a in zip(choice.names, arrays, strict=True)]
    return Payload(
        claims,
        images,
        not choice.moments and any(is_twofold(header.shape) for _, header, _ in arrays),
        _beside(stream, others, choice.said),
        tuple(counts) if choice.several else (),
    )


class _Header:
    """The checked header of a .npy stream; `start` is where the numbers begin.

    fortran: whether the first axis is the fastest, as of a tensor that was transposed.
    """

    __slots__ = ("dtype", "fortran", "numbers", "shape", "start")

    def __init__(
        self,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        start: int,
        numbers: Numbers,
        fortran: bool,
    ) -> None:
        self.dtype, self.shape, self.start, self.numbers = dtype, shape, start, numbers
        self.fortran = fortran


def _header(stream: BinaryIO, size: int, reading: Reading) -> _Header:
    """Read and check the header; the stream is at its start, and `size` bytes long."""
    dtype, shape, start, fortran = _parsed(stream)
    numbers = numbers_of(dtype, reading, _EXPECTED)
    _check_size(dtype, shape, size - start)
    fortran = fortran and len(shape) > 1
    if fortran and size - start > MAX_GATHERED:
        raise LatentsError(
            f"is in Fortran order, of which all {size - start} bytes have to be read at once, over "
            f"the limit of {MAX_GATHERED}: save np.ascontiguousarray(latents)"
        )
    return _Header(dtype, shape, start, numbers, fortran)


def _any_header(stream: BinaryIO) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    dtype, shape, start, fortran = _parsed(stream)
    if fortran and len(shape) > 1:
        raise LatentsError("is in Fortran order: save np.ascontiguousarray(latents)")
    return dtype, shape, start


def _parsed(stream: BinaryIO) -> tuple[np.dtype[Any], tuple[int, ...], int, bool]:
    """Type, shape, where the numbers begin, and whether they lie in Fortran order."""
    prefix = stream.read(8)
    if len(prefix) < 8 or prefix[:6] != _MAGIC:
        kind = kind_of(prefix)
        found = f": it is {kind}" if kind else ", or is truncated"
        raise LatentsError(f"is not a .npy file{found}")
    version = (prefix[6], prefix[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise LatentsError(f"has .npy version {version[0]}.{version[1]}, known are 1.0 to 3.0")
    width = 2 if version == (1, 0) else 4
    length_bytes = read_exactly(stream, width)
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_NPY_HEADER:
        raise LatentsError(f"has a header of {length} bytes, over the limit of {MAX_NPY_HEADER}")
    text = read_exactly(stream, length)
    if not text.isascii():
        # Versions differ in how they read other characters, which plain numbers do not need.
        raise LatentsError("has a .npy header that is not plain text")
    read = (
        np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    )
    try:
        if version == (3, 0):
            # As numpy has it, numbers of Python 2 (16L) are of older versions alone; else the two
            # differ in their text encoding only.
            ast.literal_eval(text.decode("ascii"))
        shape, fortran, dtype = read(io.BytesIO(length_bytes + text))
    except Exception as error:  # literal_eval of hostile text raises a dozen types
        raise LatentsError("has a damaged .npy header") from error
    if len(shape) > MAX_AXES or any(isinstance(axis, bool) or axis < 0 for axis in shape):
        raise LatentsError(f"has an impossible shape {list(shape)}"[:200])
    return dtype, tuple(shape), 8 + width + length, fortran


def _check_size(dtype: np.dtype[Any], shape: tuple[int, ...], held: int) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if expected != held:
        short = "is truncated" if expected > held else "has more data after its numbers"
        raise LatentsError(
            f"{short}: the header says shape {list(shape)} of {dtype.name}, {expected} bytes, and "
            f"{held} are there"
        )


def _images(stream: BinaryIO, header: _Header, layout: Plan) -> Iterator[Image | LatentsError]:
    """Every image of an array whose numbers begin where the stream stands."""
    bytes_each = math.prod(layout.stored) * header.dtype.itemsize
    if header.fortran:
        data = read_exactly(stream, bytes_each * layout.count)
        array = np.frombuffer(data, header.numbers.stored).reshape(header.shape, order="F")
        for image in array.reshape(layout.count, *layout.stored):
            yield header.numbers.latents(image[: layout.shape[0]])
        return
    for index in range(layout.count):
        if stream.seekable():
            # Others may have moved the stream between two images.
            stream.seek(header.start + index * bytes_each)
        numbers = np.frombuffer(read_exactly(stream, bytes_each), dtype=header.numbers.stored)
        image = numbers.reshape(layout.stored)[: layout.shape[0]]
        yield header.numbers.latents(image)


# -- .npz ------------------------------------------------------------------------------------


def _checked(entry: Entry) -> Entry:
    if entry.method not in (STORED, DEFLATED):
        raise LatentsError(
            f"holds {entry.name[:60]!r} in an unknown compression {entry.method}: use "
            "numpy.savez_compressed"
        )
    limit = min(MAX_INFLATED, MIN_INFLATED + MAX_RATIO * entry.packed)
    if entry.method == DEFLATED and entry.size > limit:
        raise LatentsError(
            f"holds {entry.name[:60]!r} of {entry.size} bytes in {entry.packed}, over the limit of "
            f"{limit}: save it with numpy.savez, without compression"
        )
    return entry


def _beside(stream: BinaryIO, entries: dict[str, Entry], said: bool) -> Beside:
    """The parts of an archive that are not read."""
    arrays: list[tuple[str, tuple[int, ...]]] = []
    unknown: list[str] = []
    for name, entry in entries.items():
        head = read_exactly(entry_stream(stream, entry), min(HEAD, entry.size))
        if not head.startswith(_MAGIC):
            # numpy.load gives the bytes of such a part.
            if could_hold_latents(name, partial(bytes, head)):
                unknown.append(name)
            continue
        try:
            dtype, shape, _, _ = _parsed(entry_stream(stream, entry))
        except LatentsError:
            unknown.append(name)
            continue
        if dtype.kind == "f" or dtype.str[1:] == "V2":
            arrays.append((name, shape))
    found = Beside.of(arrays, said)
    if said:
        return Beside((), found.texts, found.left + len(unknown))
    return Beside((*found.unread, *unknown), found.texts)


def _choice(stream: BinaryIO, entries: dict[str, Entry], reading: Reading) -> Choice:
    """The names of the latents, in alphabetical order."""
    arrays: dict[str, tuple[tuple[int, ...], bool]] = {}
    _check_count(len(entries.keys() - KEYS) - 1)
    for name in sorted(entries.keys() - KEYS):
        try:
            dtype, shape, _, _ = _parsed(entry_stream(stream, entries[name]))
        except LatentsError:
            shape, floating = (), False  # its own error follows where it is read
        else:
            floating = dtype.kind == "f" or dtype.str[1:] == "V2"
        arrays[name] = (shape, floating)
    return choose(arrays, reading, sorted(entries), "an array named latents")


def _check_count(beside: int) -> None:
    """Each array's header is read, so there may not be very many of them."""
    if beside > MAX_BESIDE:
        raise LatentsError(
            f"holds {beside} arrays beside its latents, over the limit of {MAX_BESIDE}: save "
            "the latents in a file of their own"
        )


def _small(stream: BinaryIO, entry: Entry) -> Any:
    """One of the known keys, as plain Python."""
    if entry.size > MAX_METADATA:
        raise LatentsError(f"holds {entry.name[:60]!r} of {entry.size} bytes: too long")
    data = read_exactly(entry_stream(stream, entry), entry.size)
    stream = io.BytesIO(data)
    dtype, shape, start = _any_header(stream)
    if dtype.kind not in _CLAIM_KINDS:
        raise LatentsError(f"holds {entry.name[:60]!r} of {dtype}: text, numbers or truth expected")
    _check_size(dtype, shape, len(data) - start)
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).tolist()
