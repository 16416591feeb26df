""".pt and .pth: zip archives of torch.save, read without torch and without unpickling anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentsError
from latentguard.files.beside import Beside
from latentguard.files.bounds import MAX_GATHERED, MAX_PICKLE, MAX_REPEATS, MIN_READING, TENSOR_COST
from latentguard.files.choice import SINGLE_NAMES, choose, is_moments
from latentguard.files.claims import KEYS, Claims, Image, Payload, image_id, is_twofold, plan
from latentguard.files.compressed import is_gzip, unpacked
from latentguard.files.explain import no_latents
from latentguard.files.numbers import numbers_of
from latentguard.files.options import NOTHING_SAID, Reading
from latentguard.files.pickle_structure import Tensor, read_structure
from latentguard.files.signatures import check_start, kind_of
from latentguard.files.streams import read_exactly
from latentguard.files.zip_archive import STORED, Entry, read_archive
from latentguard.spaces.arrays import BFLOAT16

# What torch.save wrote before version 1.6, and what pickle.dump writes, is a bare pickle.
_PICKLE_START = b"\x80"
_FLOATS = (np.dtype("<f2"), np.dtype("<f4"), np.dtype("<f8"), BFLOAT16)
# What torch.save writes beside data.pkl and data/KEY. A part that is not known could change what
# the numbers mean, as `byteorder` did when it came.
_KNOWN = {
    "data.pkl",
    "version",
    "byteorder",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
}
_VERSIONS = range(1, 11)
_ALIGNMENT = 64  # of torch.save, where a file does not say it
_MAX32 = 0xFFFFFFFF


def open_torch(
    stream: BinaryIO, size: int, claims: Claims, reading: Reading = NOTHING_SAID
) -> Payload:
    """A tensor, a list of tensors, a dict of either whose latents are found by their names
    (choice.py), or a list of such dicts; compressed with gzip or not."""
    if is_gzip(stream):
        stream, size = unpacked(stream, size)
    check_start(stream, size, "a file of torch.save")
    value, places = _read(stream, size)
    found = _Found.of(value, reading)
    claims = found.claims.merged(claims, "the file", "the metadata next to it")
    if not found.tensors:
        raise LatentsError("holds an empty list: there are no latents in it")
    others = Beside()
    if found.names is not None:
        others = _beside(value, [tensor for _, tensor in found.tensors], found.said)

    def images() -> Iterator[Image | LatentsError]:
        reader = _Reader(stream, size)
        for _, tensor in found.tensors:
            yield from _images(tensor, reader, places, claims, reading, found.moments)

    twofold = not found.moments and any(
        isinstance(tensor, Tensor) and is_twofold(tensor.shape) for _, tensor in found.tensors
    )
    parts = tuple((name, _count(t, claims, found.moments)) for name, t in found.tensors)
    return Payload(claims, images, twofold, others, parts if found.several else ())


def read_value(stream: BinaryIO, size: int) -> Any:
    """What a file of torch.save holds, with tensors as descriptions; nothing is unpickled."""
    return _read(stream, size)[0]


@dataclass(frozen=True)
class _Found:
    """The latents of a file: `tensors` with the names that they have there, in order.

    names: of the dicts that hold them, None where there are none. several: whether the names tell
    images apart.
    """

    tensors: list[tuple[str, Any]]
    claims: Claims = field(default_factory=Claims)
    moments: bool = False
    names: tuple[str, ...] | None = None
    several: bool = False
    said: bool = False

    @classmethod
    def of(cls, value: Any, reading: Reading) -> _Found:
        """Of what a file holds. Raises LatentsError where it is not said which are latents."""
        if isinstance(value, Mapping):
            return cls._of_dict(value, reading)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            return cls._of_dicts(value, reading)
        return cls(_flat("", value), moments=reading.moments)

    @classmethod
    def _of_dict(cls, value: Mapping[Any, Any], reading: Reading) -> _Found:
        claims = Claims.parse(_own(value), pixels=reading.pixels)
        names = tuple(str(key) for key in value)
        if reading.key is not None:
            found = _under(value, reading.key)
            if found is None:
                raise no_latents(names, (), f"{reading.key[:60]!r}, as --key says", said=True)
            moments = reading.moments or is_moments(re.split(r"[./]", reading.key)[-1])
            if not _is_dicts(found):
                return cls(_flat("", found), claims, moments, names, said=True)
            inner = cls.of(found, replace(reading, key=None))
            claims = inner.claims.merged(claims, f"what is under {reading.key[:60]!r}", "the file")
            moments = moments or inner.moments
            return cls(inner.tensors, claims, moments, names, inner.several, True)
        tensors = {key for key, item in value.items() if isinstance(item, Tensor)}
        lists = {key for key in SINGLE_NAMES if isinstance(value.get(key), (list, tuple))}
        wanted = tensors | lists | ({"latents"} & value.keys())
        arrays = {str(key): item for key, item in value.items() if key in wanted}
        if len(arrays) < len(wanted):
            # Keys may be numbers, too: 1 and "1" are two.
            raise no_latents(names, [str(k) for k in value if k in tensors], "the key latents")
        shaped = {
            name: (item.shape, item.dtype in _FLOATS) if isinstance(item, Tensor) else ((), False)
            for name, item in arrays.items()
        }
        # Names tell images apart only where there is nothing else.
        alone = value.keys() <= tensors | KEYS
        choice = choose(shaped, reading, names, "the key latents", alone)
        found = [pair for name in choice.names for pair in _flat(name, arrays[name])]
        return cls(found, claims, choice.moments, names, choice.several)

    @classmethod
    def _of_dicts(cls, values: Sequence[Any], reading: Reading) -> _Found:
        tensors: list[tuple[str, Any]] = []
        claims = Claims()
        ids: list[str] = []
        found = []
        for number, value in enumerate(values):
            if not isinstance(value, Mapping):
                raise LatentsError(f"holds a list of dicts with a {type(value).__name__} in it")
            found.append(cls._of_dict(value, reading))
            own = found[-1].claims
            ids += own.ids or ()
            claims = replace(own, ids=None).merged(
                claims, f"the dict at place {number} of its list", "one before it"
            )
            label = image_id(value["id"]) if "id" in value else str(number)
            tensors += [
                (f"{label}/{name}" if found[-1].several else label, tensor)
                for name, tensor in found[-1].tensors
            ]
        named = all(one.claims.ids for one in found)
        claims = replace(claims, ids=tuple(ids)) if named else claims
        names = tuple(str(key) for value in values for key in value)
        moments = {one.moments for one in found}
        if len(moments) > 1:
            raise LatentsError("holds a list of dicts of latents and of moments: save two files")
        return cls(tensors, claims, moments.pop(), names, not named, found[0].said)


def _is_dicts(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], Mapping)
    return isinstance(value, Mapping)


def _flat(name: str, latents: Any) -> list[tuple[str, Any]]:
    """A tensor, or each one of a list, under the same name."""
    items = latents if isinstance(latents, (list, tuple)) else [latents]
    return [(name, item) for item in items]


def _under(value: Any, key: str) -> Any:
    """What a dict holds under a key, or under a path `a/b` or `a.b` of keys; None for nothing."""
    if not isinstance(value, Mapping):
        return None
    if key in value:
        return value[key]
    for match in re.finditer(r"[./]", key):
        head, rest = key[: match.start()], key[match.end() :]
        if head in value and (found := _under(value[head], rest)) is not None:
            return found
    return None


def _count(tensor: Any, claims: Claims, moments: bool) -> int:
    """How many images a tensor gives; one that cannot be read gives one error."""
    if not isinstance(tensor, Tensor):
        return 1
    try:
        return plan(tensor.shape, claims, moments).count
    except LatentsError:
        return 1


def _read(stream: BinaryIO, size: int) -> tuple[Any, dict[str, int]]:
    """What the archive holds, and at which byte each storage begins, by its key."""
    start = stream.read(8)
    if start[:1] == _PICKLE_START:
        raise LatentsError(
            "is a bare pickle (pickle.dump, or torch.save before 1.6), which could run code when "
            "loaded: refused, nothing of it was executed; save it with a current torch.save"
        )
    if start[:4] != b"PK\x03\x04":
        kind = kind_of(start)
        found = f": it is {kind}" if kind else ", or is truncated"
        raise LatentsError(f"is not a file of torch.save{found}")
    entries = _entries(read_archive(stream, size))
    _check_records(stream, entries)
    storages = {name[5:]: entry for name, entry in entries.items() if name.startswith("data/")}
    structure = _content(stream, entries["data.pkl"])
    value, keys = read_structure(structure, {key: e.size for key, e in storages.items()})
    if ".format_version" in entries:
        alignment = entries.get(".storage_alignment")
        _check_places(
            [storages[key] for key in keys],
            _ALIGNMENT if alignment is None else _decimal(stream, alignment),
        )
    return value, {key: entry.begin for key, entry in storages.items()}


def _entries(found: list[Entry]) -> dict[str, Entry]:
    """The archive's parts by their name below the folder that they share, checked."""
    entries: dict[str, Entry] = {}
    if any(entry.name.lower().endswith("/constants.pkl") for entry in found):
        raise LatentsError(
            "is a TorchScript model (torch.jit.save), which holds code: save its tensors with "
            "torch.save"
        )
    folders = set()
    # torch looks names up regardless of case, so two that differ in case are the same.
    seen = set()
    for entry in found:
        if entry.method != STORED:
            raise LatentsError(
                "is a compressed or encrypted archive, which torch.save never writes"
            )
        folder, _, name = entry.name.partition("/")
        folders.add(folder)
        if name.lower() in seen:
            raise LatentsError(f"is a damaged file of torch.save: it holds {name[:60]!r} twice")
        seen.add(name.lower())
        entries[name] = entry
    if "data.pkl" not in entries or len(folders) != 1:
        raise LatentsError("is not a file of torch.save (nor is a TorchScript model)")
    unknown = [name for name in entries if name not in _KNOWN and not name.startswith("data/")]
    if unknown:
        raise LatentsError(
            f"holds {unknown[0][:60]!r}, which the known versions of torch.save do not write: save "
            "it again"
        )
    if entries["data.pkl"].size > MAX_PICKLE:
        raise LatentsError(
            f"has a structure of {entries['data.pkl'].size} bytes, over the limit of {MAX_PICKLE}"
        )
    return entries


def _check_records(stream: BinaryIO, entries: Mapping[str, Entry]) -> None:
    """The small parts, by which torch decides how it reads the others."""
    if "byteorder" in entries and _content(stream, entries["byteorder"], 16) != b"little":
        raise LatentsError("was saved on a big-endian machine, which is not supported")
    if "version" not in entries or _decimal(stream, entries["version"]) not in _VERSIONS:
        raise LatentsError("is of an unknown version: save it with a current torch.save")
    if ".storage_alignment" in entries and not _decimal(stream, entries[".storage_alignment"]):
        raise LatentsError("is a damaged file of torch.save: its alignment is 0")


def _check_places(storages: list[Entry], alignment: int) -> None:
    """LatentsError unless each storage lies where torch.save would put it behind the one before.

    torch.load can be told to compute these places from the first one, without reading the headers
    (`torch.utils.serialization.config.load.calculate_storage_offsets`).
    """
    for before, entry in pairwise(storages):
        header = before.begin + before.size
        large = before.header >= _MAX32 or before.size >= _MAX32
        if before.size:
            header += 24 if large else 16
        start = header + 30 + len(entry.name.encode()) + 4
        if header >= _MAX32 or entry.size >= _MAX32:
            start += 4 + 16 * (entry.size >= _MAX32) + 8 * (header >= _MAX32)
        if entry.header != header or entry.begin != -(-start // alignment) * alignment:
            raise LatentsError(
                f"is a damaged file of torch.save: {entry.name[:60]!r} is not where torch.save "
                "puts it; load it and save it again"
            )


def _decimal(stream: BinaryIO, entry: Entry) -> int:
    text = _content(stream, entry, 16).removesuffix(b"\n")
    if not text.isdigit():
        raise LatentsError(f"is a damaged file of torch.save: {entry.name[:60]!r} is not a number")
    return int(text)


def _content(stream: BinaryIO, entry: Entry, limit: int = MAX_PICKLE) -> bytes:
    if entry.size > limit:
        raise LatentsError(
            f"is a damaged file of torch.save: {entry.name[:60]!r} has {entry.size} bytes"
        )
    stream.seek(entry.begin)
    return read_exactly(stream, entry.size)


def _own(value: Mapping[Any, Any]) -> dict[str, Any]:
    """What a dict says about its latents."""
    return {key: item for key, item in value.items() if isinstance(key, str) and key in KEYS}


def _beside(value: Any, latents: list[Any], said: bool) -> Beside:
    """The tensors of a file, in whatever it holds, that are not among its latents."""
    read = {item for item in latents if isinstance(item, Tensor)}
    waiting: list[tuple[str, Any]] = [("", value)]
    seen = set()
    found = []
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, Tensor):
            if item not in read and item.dtype in _FLOATS:
                found.append((name, item.shape))
        elif isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
            seen.add(id(item))  # a list can hold itself
            inner = item.items() if isinstance(item, Mapping) else ((name, one) for one in item)
            waiting += ((str(key), one) for key, one in inner)
    return Beside.of(reversed(found), said)


# -- numbers ---------------------------------------------------------------------------------


class _Reader:
    """Reads a file's numbers, in all a bounded multiple of what it holds.

    Tensors may share a storage: thousands of them over the same bytes are thousands of images.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._left = MIN_READING + MAX_REPEATS * size

    def spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise LatentsError(
                f"describes tensors of over {MAX_REPEATS} times what it stores: save each one as "
                "tensor.clone()"
            )

    def numbers(self, begin: int, tensor: Tensor, first: int, count: int) -> NDArray[Any]:
        """`count` numbers of a tensor's storage, which begins at byte `begin`, from `first` on."""
        size = tensor.dtype.itemsize
        self.spend(count * size)
        self._stream.seek(begin + first * size)
        return np.frombuffer(read_exactly(self._stream, count * size), tensor.dtype)


def _images(
    tensor: Any,
    reader: _Reader,
    places: Mapping[str, int],
    claims: Claims,
    reading: Reading,
    moments: bool,
) -> Iterator[Image | LatentsError]:
    reader.spend(TENSOR_COST)
    if not isinstance(tensor, Tensor):
        yield LatentsError(f"latents must be tensors, got {type(tensor).__name__}")
        return
    try:
        numbers_are = numbers_of(tensor.dtype, reading, "floating point numbers", str(tensor.dtype))
        layout = plan(tensor.shape, claims, moments)
    except LatentsError as error:
        yield error
        return
    begin = places[tensor.key]
    strides = tensor.strides
    if layout.frames is not None:
        strides = strides[: layout.frames] + strides[layout.frames + 1 :]
    batched = len(strides) > len(layout.shape)
    strides = strides[1:] if batched else strides
    step = tensor.strides[0] if batched else 0
    one = _extent(layout.shape, strides)
    whole = one + (layout.count - 1) * step
    # Images that interleave are read together, else the same bytes would be read for each.
    together = layout.count * one > 2 * whole
    gathered = (whole if together else one) * tensor.dtype.itemsize
    if gathered > MAX_GATHERED and (together or one > 2 * _extent(layout.shape)):
        yield LatentsError(
            f"a tensor of shape {list(tensor.shape)} lies scattered over {gathered} bytes, over "
            f"the limit of {MAX_GATHERED}: save tensor.contiguous() instead"
        )
        return
    if together:
        numbers = reader.numbers(begin, tensor, tensor.offset, whole)
    for index in range(layout.count):
        if together:
            image = numbers[index * step :]
        else:
            image = reader.numbers(begin, tensor, tensor.offset + index * step, one)
        bytes_each = tuple(n * tensor.dtype.itemsize for n in strides)
        # Of moments the first half of the channels, the means.
        yield numbers_are.latents(
            np.lib.stride_tricks.as_strided(image, layout.shape, bytes_each, writeable=False)
        )


def _extent(shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> int:
    """From the first to the last number of an array that is not empty, in numbers."""
    if strides is None:
        return int(np.prod(shape, dtype=object))
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
