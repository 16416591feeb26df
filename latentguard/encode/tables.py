"""Pictures of tables: Parquet files, and the Arrow files in which Hugging Face's datasets are kept.

A column holds the bytes of pictures, or structs of `bytes` and `path` as Hugging Face writes them.
A path without bytes is not followed. Needs pyarrow alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from latentguard.encode.pictures import check_bytes
from latentguard.encode.samples import Problem, Sample, plain_id
from latentguard.encode.tars import CAPTION_KEYS
from latentguard.errors import LatentsError
from latentguard.files.parquet import batches, bounded, open_parquet, pyarrow
from latentguard.files.streams import Window, open_regular, size_of
from latentguard.files.tables import IDS

if TYPE_CHECKING:
    import pyarrow as pa

_PICTURES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes")
_LABELS = ("label", "cls", "labels", "class")
_CAPTIONS = (*CAPTION_KEYS, "txt")
_MAX_TEXT = 2**20
_MAX_LABEL = 1000


@dataclass(frozen=True)
class Columns:
    """Which columns are read; None is the usual one, where there is one."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None


def parquet_samples(path: Path, columns: Columns) -> Iterator[Sample | Problem]:
    """The rows of a Parquet file in order. Raises LatentsError for what is none."""
    with open_regular(path) as stream:
        size = size_of(stream)
        file = open_parquet(stream, size)
        table = _Table.of(file.schema_arrow, columns)
        found = (
            batch
            for group in range(file.metadata.num_row_groups)
            for batch in batches(file, group, table.names)
        )
        yield from _rows(path, bounded(found, size), table)


def count_rows(path: Path) -> int:
    """Of a Parquet file. Raises LatentsError."""
    with open_regular(path) as stream:
        return int(open_parquet(stream, size_of(stream)).metadata.num_rows)


def arrow_samples(path: Path, columns: Columns) -> Iterator[Sample | Problem]:
    """The rows of an Arrow file in order, a stream or a file of it. Raises LatentsError."""
    pa = pyarrow()
    with open_regular(path) as stream, _damage(pa):
        size = size_of(stream)
        reader = pa.ipc.MessageReader.open_stream(_Bounded(stream, *_messages(stream, size)))
        schema = _schema(pa, reader)
        table = _Table.of(schema, columns)
        found = _record_batches(pa, reader, schema)
        yield from _rows(path, bounded(found, size), table)


def dataset_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a dataset that Hugging Face's `save_to_disk` wrote, in order.

    None where the folder holds none: other Arrow files in it are caches. Raises LatentsError.
    """
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        with open_regular(state) as stream:
            values = json.loads(stream.read(_MAX_TEXT))
        names = [entry["filename"] for entry in values["_data_files"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise LatentsError("names files outside its folder")
    return [folder / name for name in names]


# -- Arrow -----------------------------------------------------------------------------------


class _Bounded(Window):
    """A window that allocates for no more than it holds, whatever a message announces."""

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        return super().read(left if size is None or size < 0 else min(size, left)) or b""


def _messages(stream: BinaryIO, size: int) -> tuple[int, int]:
    """Where the messages begin, and how many bytes they and what follows them are."""
    head = stream.read(8)
    begin = 8 if head[:6] == b"ARROW1" else 0
    return begin, size - begin


@contextmanager
def _damage(pa: Any) -> Iterator[None]:
    try:
        yield
    except LatentsError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error, MemoryError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise LatentsError(
            f"is a damaged Arrow file, or of a kind that is not read ({reason})"
        ) from error


def _schema(pa: Any, reader: Any) -> pa.Schema:
    message = next(_read_messages(reader), None)
    if message is None or message.type != "schema":
        raise LatentsError("is not an Arrow file: it does not begin with a schema")
    schema = pa.ipc.read_schema(message)
    if len(set(schema.names)) != len(schema.names):
        raise LatentsError(
            "is a table with two columns of the same name, and readers differ on which one counts"
        )
    return schema


def _read_messages(reader: Any) -> Iterator[Any]:
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _record_batches(pa: Any, reader: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for message in _read_messages(reader):
        if message.type == "dictionary":
            raise LatentsError("has columns that are encoded by a dictionary, which are not read")
        if message.type != "record batch":
            raise LatentsError(f"has a message of the kind {message.type!r:.40}, which is not read")
        if _is_compressed(message.metadata.to_pybytes()):
            raise LatentsError(
                "is compressed, which is not supported for an Arrow file of pictures"
            )
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)  # offsets that lead outside of a buffer
        yield batch


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch's message, a flatbuffer, says that its buffers are compressed.

    What they unpack to is known only once it is unpacked.
    """
    message = struct.unpack_from("<I", metadata, 0)[0]
    header = _field(metadata, message, 2)
    if header is None:
        raise LatentsError("is a damaged Arrow file: a message has no header")
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return _field(metadata, batch, 3) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table is; None where it is not set."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise LatentsError("is a damaged Arrow file")
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + place)[0]
    return table + offset if offset else None


# -- columns and rows ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """The columns that are read. classes: names of the label's numbers, as Hugging Face has them.

    nested: whether the pictures are structs.
    """

    image: str
    nested: bool
    caption: str | None
    label: str | None
    id: str | None
    classes: tuple[str, ...] | None

    @property
    def names(self) -> list[str]:
        found = (self.image, self.caption, self.label, self.id)
        return list(dict.fromkeys(name for name in found if name))

    @classmethod
    def of(cls, schema: pa.Schema, columns: Columns) -> _Table:
        """Raises LatentsError where a column is not there, or it is not clear which one counts."""
        pa = pyarrow()
        kinds = {field.name: field.type for field in schema}
        for name in (columns.image, columns.caption, columns.label):
            if name is not None and name not in kinds:
                raise LatentsError(f"has no column {name[:60]!r}, only {_shown(list(kinds))}")
        features = _features(schema)
        image = columns.image or _image(pa, kinds, features)
        nested = pa.types.is_struct(kinds[image])
        if not _holds_pictures(pa, kinds[image]):
            raise LatentsError(f"has no bytes of pictures in its column {image[:60]!r}")
        caption = columns.caption or _first(_CAPTIONS, kinds, lambda kind: _is_text(pa, kind))
        label = columns.label or _first(
            _LABELS, kinds, lambda kind: pa.types.is_integer(kind) or _is_text(pa, kind)
        )
        names = features.get(label or "", {}).get("names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            names = None
        identity = _first(IDS, kinds, lambda kind: pa.types.is_integer(kind) or _is_text(pa, kind))
        return cls(image, nested, caption, label, identity, None if names is None else tuple(names))


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What Hugging Face says of each column."""
    try:
        said = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {name: value for name, value in said.items() if isinstance(value, dict)}


def _image(pa: Any, kinds: dict[str, Any], features: dict[str, dict[str, Any]]) -> str:
    holders = [name for name, kind in kinds.items() if _holds_pictures(pa, kind)]
    said = [name for name in holders if features.get(name, {}).get("_type") == "Image"]
    usual = [name for name in _PICTURES if name in holders]
    found = said or usual[:1] or holders
    if len(found) != 1:
        what = f"several columns of pictures ({_shown(found)})" if found else "no column of them"
        raise LatentsError(
            f"is a table with {what}: name the one that counts (--image-column), one of "
            f"{_shown(list(kinds))}"
        )
    return found[0]


def _holds_pictures(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_pictures(pa, kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _first(
    names: tuple[str, ...], kinds: dict[str, Any], good: Callable[[Any], bool]
) -> str | None:
    return next((name for name in names if name in kinds and good(kinds[name])), None)


def _shown(names: list[str]) -> str:
    return ", ".join(name[:30] for name in names[:8]) + (", ..." if len(names) > 8 else "")


def _rows(path: Path, found: Iterator[pa.RecordBatch], table: _Table) -> Iterator[Sample | Problem]:
    number = 0
    for batch in found:
        for place in range(batch.num_rows):
            yield _row(path, batch, place, number, table)
            number += 1


def _row(
    path: Path, batch: pa.RecordBatch, place: int, number: int, table: _Table
) -> Sample | Problem:
    source = f"{path}::row {number}"
    try:
        name = _text(batch, table.id, place) or _path(batch, table, place)
        label = None if table.label is None else batch.column(table.label)[place].as_py()
        if not (label is None or isinstance(label, int | str)) or len(str(label)) > _MAX_LABEL:
            raise LatentsError(
                f"its label is neither a whole number nor text of up to {_MAX_LABEL} characters"
            )
        names = dict(enumerate(table.classes or ()))
        named = names.get(label) if isinstance(label, int) else None
        return Sample(
            id=plain_id(name or f"{path.name}/{number}"),
            source=source,
            read=partial(_read, batch, table, place),
            caption=_text(batch, table.caption, place),
            label=label,
            label_name=None if named is None else plain_id(named),
        )
    except LatentsError as error:
        return Problem(source, str(error))


def _text(batch: pa.RecordBatch, column: str | None, place: int) -> str | None:
    value = None if column is None else batch.column(column)[place].as_py()
    if value is None:
        return None
    text = str(value)
    if len(text) > _MAX_TEXT:
        raise LatentsError(f"its {column} has {len(text)} characters, over the limit")
    return text


def _path(batch: pa.RecordBatch, table: _Table, place: int) -> str | None:
    """The name that Hugging Face keeps beside the bytes."""
    if not table.nested:
        return None
    cell = batch.column(table.image)[place]
    value = cell["path"].as_py() if cell.is_valid and "path" in cell else None
    return value if isinstance(value, str) and value else None


def _read(batch: pa.RecordBatch, table: _Table, place: int) -> bytes:
    cell = batch.column(table.image)[place]
    if table.nested and cell.is_valid:
        cell = cell["bytes"]
    if not cell.is_valid:
        raise LatentsError("has no bytes of a picture, and its path is not followed")
    check_bytes(len(cell.as_buffer()))
    data: bytes = cell.as_py()
    return data
