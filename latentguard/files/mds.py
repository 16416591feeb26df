"""MosaicML's MDS: shards of samples that describe their columns, and an index.json beside them.

A shard holds the number of its samples, where each one begins, a JSON description of its columns,
and the samples: sizes of the values that vary in size, then the values. StreamingDataset takes the
columns from index.json, so that has to agree with what the shard says of itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_AXES, MAX_MDS_INDEX, MAX_METADATA
from latentguard.files.claims import Claims, Payload, image_id
from latentguard.files.compressed import unpacked, unpacked_zstd
from latentguard.files.options import Reading
from latentguard.files.passed_over import HEAD, PassedOver, begins_as_numbers
from latentguard.files.streams import open_regular, read_exactly, size_of
from latentguard.files.tables import Column, Row, Table, choose_columns
from latentguard.files.values import STORED, array_payload, bytes_payload, shaped

INDEX = "index.json"
SHARDS = (".mds", ".mds.zstd", ".mds.zst", ".mds.gz")

_Unpack = Callable[[BinaryIO, int], tuple[BinaryIO, int]]
_COMPRESSED: dict[str, _Unpack] = {
    ".zstd": unpacked_zstd,
    ".zst": unpacked_zstd,
    ".gz": unpacked,
}
# Numbers before an array whose type, or the type of whose shape, is not fixed.
_TYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32",
    34: "float32", 64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
_WHOLE: dict[str, np.dtype[Any]] = {
    "int": np.dtype("<i8"), "int8": np.dtype("i1"), "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"), "int64": np.dtype("<i8"), "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "uint64": np.dtype("<u8"),
}  # fmt: skip
_TEXT = ("str", "str_int")
_OTHERS = (
    "float16", "float32", "float64", "str_float", "str_decimal", "jpeg", "jpeg_array",
    "jpegarray", "list[jpeg]", "png", "pil", "json",
)  # fmt: skip
_AGREED = ("column_names", "column_encodings", "column_sizes")


@dataclass(frozen=True)
class _Shard:
    """The checked beginning of a shard. begins: where its samples begin, and the last one ends."""

    stream: BinaryIO
    samples: int
    names: list[str]
    encodings: list[str]
    sizes: list[int | None]
    size: int
    start: int


def read_mds(
    stream: BinaryIO, size: int, path: Path, reading: Reading, passed: PassedOver
) -> Iterator[Row | LatentsError]:
    """The samples of a shard of `size` bytes, in order.

    Args:
        path: of the shard, beside which index.json may lie; its suffix says how it is compressed.

    Raises:
        LatentsError: a damaged shard, one that index.json describes otherwise, or columns of which
            it is not said which one holds the latents.
    """
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        stream, size = _COMPRESSED[suffix](stream, size)
    shard = _opened(stream, size)
    _check_index(shard, path)
    columns = [_column(*one) for one in zip(shard.names, shard.encodings, shard.sizes, strict=True)]
    table = choose_columns(columns, reading, passed)
    aside: list[str] = []
    if reading.key is None:
        known = (table.latents, *table.unread)
        pairs = zip(shard.names, shard.encodings, strict=True)
        aside = [name for name, kind in pairs if kind == "bytes" and name not in known]
    at = shard.start
    for number in range(shard.samples):
        stream.seek(4 + 4 * number)
        begin, end = (int(n) for n in np.frombuffer(read_exactly(stream, 8), "<u4"))
        if begin != at or not begin <= end <= size:
            raise LatentsError(f"is a damaged MDS shard: sample {number} is not where it should be")
        at = end
        yield _row(shard, table, aside, number, begin, end, reading)
    if at != size:
        raise LatentsError("is a damaged MDS shard: more data follows after its last sample")
    table.check()


def missing_shards(folder: str) -> list[str] | None:
    """Shards that the index.json of a folder names and that are not there.

    None where index.json is no index of MDS. Raises LatentsError where it cannot be read.
    """
    return _missing(_index(Path(folder) / INDEX), lambda name: os.path.exists(f"{folder}/{name}"))


def missing_of(index: bytes, there: Container[str]) -> list[str] | None:
    """As `missing_shards`, from the contents of an index.json and the names of what is there."""
    if len(index) > MAX_MDS_INDEX:
        raise LatentsError(f"has {len(index)} bytes, over the limit of {MAX_MDS_INDEX}")
    return _missing(_parsed(index), lambda name: name in there)


def _missing(index: _Index, exists: Callable[[str], bool]) -> list[str] | None:
    shards = list(index)
    return [names[0] for names in shards if not any(map(exists, names))] if shards else None


# -- the shard -------------------------------------------------------------------------------


def _opened(stream: BinaryIO, size: int) -> _Shard:
    stream.seek(0)
    samples = int.from_bytes(read_exactly(stream, 4), "little")
    table = 4 + 4 * (samples + 1)
    if table > size:
        raise LatentsError(f"is not an MDS shard, or is truncated: it announces {samples} samples")
    if not samples:
        raise LatentsError("holds no sample")
    stream.seek(4)
    start = int.from_bytes(read_exactly(stream, 4), "little")
    if not table <= start <= size or start - table > MAX_METADATA:
        raise LatentsError("is a damaged MDS shard: its first sample does not follow its header")
    stream.seek(table)
    try:
        config = json.loads(read_exactly(stream, start - table))
    except (ValueError, RecursionError) as error:
        raise LatentsError("is not an MDS shard: it does not describe its columns") from error
    if not isinstance(config, dict) or config.get("format") != "mds" or config.get("version") != 2:
        raise LatentsError("is not an MDS shard of version 2")
    names, encodings, sizes = (config.get(key, ()) for key in _AGREED)
    if not (_texts(names) and _texts(encodings) and isinstance(sizes, list)):
        raise LatentsError("is a damaged MDS shard: its columns")
    whole = all(n is None or (type(n) is int and 0 < n < 2**32) for n in sizes)
    if not whole or not len(names) == len(encodings) == len(sizes) == len(set(names)):
        raise LatentsError("is a damaged MDS shard: its columns")
    return _Shard(stream, samples, names, encodings, sizes, size, start)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_index(shard: _Shard, path: Path) -> None:
    """LatentsError where index.json describes the shard otherwise than it does itself."""
    index = path.parent / INDEX
    if not index.exists():
        return
    entry = _index(index).get_entry(path.name)
    if entry is None:
        return
    own = {
        "column_names": shard.names,
        "column_encodings": shard.encodings,
        "column_sizes": shard.sizes,
    }
    raw = entry.get("raw_data")
    stated = raw.get("bytes") if isinstance(raw, dict) else None
    differs = next((key for key in _AGREED if entry.get(key) != own[key]), None)
    if differs is None and entry.get("samples") != shard.samples:
        differs = "samples"
    if differs is None and stated != shard.size:
        differs = "raw_data"
    if differs is not None:
        raise LatentsError(f"does not agree with its index.json ({differs})")


class _Index:
    """The shards of an index.json: for each the names that it may have, and its description."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._names = [_names(entry) for entry in entries]
        self._entries = {
            name: entry for entry, names in zip(entries, self._names, strict=True) for name in names
        }

    def __iter__(self) -> Iterator[list[str]]:
        return iter(self._names)

    def get_entry(self, name: str) -> dict[str, Any] | None:
        return self._entries.get(name)


def _index(path: Path) -> _Index:
    try:
        status = path.stat()
    except OSError:
        return _Index([])
    return _read_index(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read_index(path: Path, changed: int, size: int) -> _Index:
    """What an index.json says; read once for the many shards beside it."""
    with open_regular(path) as stream:
        held = size_of(stream)
        if held > MAX_MDS_INDEX:
            raise LatentsError(f"has {held} bytes, over the limit of {MAX_MDS_INDEX}")
        return _parsed(read_exactly(stream, held))


def _parsed(data: bytes) -> _Index:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LatentsError(f"has an index.json beside it that is not JSON ({error})") from error
    shards = value.get("shards") if isinstance(value, dict) else None
    entries = shards if isinstance(shards, list) else []
    return _Index([one for one in entries if isinstance(one, dict) and one.get("format") == "mds"])


def _names(entry: dict[str, Any]) -> list[str]:
    """The file names of a shard, unpacked and packed; none that lead to another folder."""
    found = []
    for key in ("raw_data", "zip_data"):
        info = entry.get(key)
        name = info.get("basename") if isinstance(info, dict) else None
        if isinstance(name, str):
            if "/" in name or "\\" in name or "\0" in name:
                raise LatentsError(f"names a shard of another folder in index.json ({name[:60]!r})")
            found.append(name)
    if not found:
        raise LatentsError("is a damaged index.json: a shard without a name")
    return found


# -- columns and samples ---------------------------------------------------------------------


def _column(name: str, encoding: str, size: int | None) -> Column:
    kind, _, config = encoding.partition(":")
    if kind == "bytes":
        return Column(name, True)
    if kind == "ndarray":
        dtype, shape = _fixed(config)
        if dtype is not None and dtype not in STORED:
            return Column(name, False)
        return Column(name, True, shape=shape)
    if kind in STORED and size is None:
        return Column(name, True)  # bare numbers, as imagenet.int8 has them
    if kind == "pkl":
        return Column(name, False, True)
    return Column(name, False, kind not in {*_TEXT, *_WHOLE, *_OTHERS})


def _fixed(config: str) -> tuple[str | None, tuple[int, ...] | None]:
    """Type and shape of an array that a column's encoding fixes."""
    if not config:
        return None, None
    dtype, colon, sizes = config.partition(":")
    parts = sizes.split(",")
    good = all(part.isascii() and part.isdigit() and 0 < int(part) < 2**31 for part in parts)
    if dtype not in _TYPES.values() or (colon and not good):
        raise LatentsError(f"is a damaged MDS shard: the encoding ndarray:{config[:60]!r}")
    return dtype, tuple(int(part) for part in parts) if colon else None


def _row(
    shard: _Shard,
    table: Table,
    aside: list[str],
    number: int,
    begin: int,
    end: int,
    reading: Reading,
) -> Row | LatentsError:
    """A sample. aside: columns of bytes that are not read, as of pictures."""
    place = f"sample {number}"
    try:
        places = _places(shard, begin, end)
        _check_heads(shard, places, aside)
        said = {
            name: value
            for name in table.claims
            if (value := _plain(shard, name, *places[name])) is not None
        }
        claims = Claims.parse(said, pixels=reading.pixels)
        key = None if table.id is None else _plain(shard, table.id, *places[table.id])
        key = None if key is None else image_id(key)
    except LatentsError as error:
        return LatentsError(f"{place}: {error}")
    encoding = shard.encodings[shard.names.index(table.latents)]
    return Row(
        place, key, claims, partial(_payload, shard, encoding, *places[table.latents], reading)
    )


def _places(shard: _Shard, begin: int, end: int) -> dict[str, tuple[int, int]]:
    """Where each value of a sample lies, and how many bytes it has; they fill the sample."""
    varying = [name for name, size in zip(shard.names, shard.sizes, strict=True) if size is None]
    head = 4 * len(varying)
    if head > end - begin:
        raise LatentsError("is damaged: its values do not fit")
    shard.stream.seek(begin)
    sizes = iter(np.frombuffer(read_exactly(shard.stream, head), "<u4").tolist())
    at = begin + head
    places = {}
    for name, size in zip(shard.names, shard.sizes, strict=True):
        count = next(sizes) if size is None else size
        places[name] = (at, count)
        at += count
    if at != end:
        raise LatentsError("is damaged: its values do not fit")
    return places


def _check_heads(shard: _Shard, places: dict[str, tuple[int, int]], aside: list[str]) -> None:
    """LatentsError where what is not read begins as tensors do."""
    for name in aside:
        at, count = places[name]
        shard.stream.seek(at)
        if begins_as_numbers(read_exactly(shard.stream, min(HEAD, count))):
            raise LatentsError(
                f"holds what could be latents in the column {name[:60]!r}, which is not read: name "
                "the one that counts (--key)"
            )


def _plain(shard: _Shard, name: str, at: int, count: int) -> Any:
    """Text or a whole number; None for other values."""
    encoding = shard.encodings[shard.names.index(name)]
    if count > MAX_METADATA:
        raise LatentsError(f"its {name[:60]!r} has {count} bytes: too long")
    shard.stream.seek(at)
    data = read_exactly(shard.stream, count)
    if encoding in _TEXT:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise LatentsError(f"its {name[:60]!r} is not text") from error
    dtype = _WHOLE.get(encoding)
    if dtype is None or count != dtype.itemsize:
        return None
    return int(np.frombuffer(data, dtype)[0])


def _payload(
    shard: _Shard, encoding: str, at: int, count: int, reading: Reading, claims: Claims
) -> Payload:
    shard.stream.seek(at)
    data = read_exactly(shard.stream, count)
    kind, _, config = encoding.partition(":")
    if kind == "bytes":
        return bytes_payload(data, claims, reading, None)
    if kind != "ndarray":
        if len(data) % STORED[kind].itemsize:
            raise LatentsError(f"its {len(data)} bytes are not {kind} numbers")
        flat = np.frombuffer(data, STORED[kind])
        return array_payload(shaped(flat, None, claims, reading), claims, reading)
    dtype, shape = _fixed(config)
    place = 0
    if dtype is None:
        dtype = _TYPES.get(data[0]) if data else None
        place = 1
    if dtype is None or dtype not in STORED:
        raise LatentsError(f"latents must be floating point numbers, got {dtype}")
    stored = STORED[dtype]
    if shape is None:
        axes, form = divmod(data[place], 4) if len(data) > place else (0, 0)
        last = place + 1 + axes * 2**form
        if not 0 < axes <= MAX_AXES or last > len(data):
            raise LatentsError("its array has no shape that can be read")
        sizes = np.frombuffer(data[place + 1 : last], f"<u{2**form}")
        shape = tuple(int(n) for n in sizes)
        place = last
    numbers = data[place:]
    if len(numbers) != stored.itemsize * int(np.prod(shape, dtype=object)):
        raise LatentsError(f"its {len(numbers)} bytes are not of shape {list(shape)} of {dtype}")
    return array_payload(np.frombuffer(numbers, stored).reshape(shape), claims, reading)
