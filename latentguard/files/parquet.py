"""Parquet: a column of latents, read row group by row group with pyarrow (the extra `scale`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.bounds import (
    MAX_BATCH_BYTES,
    MAX_INFLATED,
    MAX_PARQUET_FOOTER,
    MAX_RATIO,
    MIB,
    MIN_INFLATED,
)
from latentguard.files.claims import Claims, Payload, image_id
from latentguard.files.options import Reading
from latentguard.files.passed_over import PassedOver, begins_as_numbers
from latentguard.files.streams import Window, read_exactly
from latentguard.files.tables import Column, Row, Table, choose_columns
from latentguard.files.values import array_payload, bytes_payload, shaped

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_MAGIC = b"PAR1"
_MAX_ROWS = 256
# Bytes of a value of fixed size that no latents fit in, such as a UUID.
_TOO_SHORT = 64
_SHAPES = ("shape", "latents_shape", "latent_shape")
# img2dataset's tables say the size of pictures.
_IMG2DATASET = {"original_height", "original_width"}
# What it writes of each picture, beside the shard that holds them.
_LISTING = {"url", "key", "status", "error_message"}


def read_parquet(
    stream: BinaryIO, size: int, reading: Reading, passed: PassedOver, name: str = ""
) -> Iterator[Row | LatentsError]:
    """The rows of a Parquet file of `size` bytes, in order.

    Args:
        passed: counts the columns that are skipped; and the file, under its `name`, if it is the
            list of pictures that img2dataset writes next to a shard.

    Raises:
        LatentsError: not a Parquet file, over the limits, no pyarrow, or a table without a certain
            column of latents.
    """
    file = open_parquet(stream, size)
    pa, schema = pyarrow(), file.schema_arrow
    columns = [_column(pa, field) for field in schema]
    if set(schema.names) >= _LISTING and not any(c.readable or c.opaque for c in columns):
        if reading.strict:
            raise LatentsError("is a list of pictures, and with --strict no file is passed over")
        passed.add_file(name)
        return
    table = choose_columns(columns, reading, passed)
    whole = _of_schema(schema, reading)
    shape = next((s for s in (f"{table.latents}_shape", *_SHAPES) if s in schema.names), None)
    pixels = reading.pixels or set(schema.names) >= _IMG2DATASET
    wanted = [table.latents, *filter(None, (table.id, shape)), *table.claims]

    def found() -> Iterator[Any]:
        for group in range(file.metadata.num_row_groups):
            if reading.key is None:
                _check_heads(pa, file, group, table, schema)
            yield from batches(file, group, wanted)

    number = 0
    for batch in bounded(found(), size):
        for place in range(batch.num_rows):
            yield _row(pa, batch, place, number, table, shape, whole, pixels, reading)
            number += 1
    if number != file.metadata.num_rows:
        raise LatentsError(
            f"is a damaged Parquet file: {file.metadata.num_rows} rows are announced, {number} are "
            "there"
        )
    table.check()


def bounded(found: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The batches of a file of `size` bytes, as long as they hold no more than it can.

    Raises LatentsError at the first that does.
    """
    left, number = MIN_INFLATED + MAX_RATIO * size, 0
    for batch in found:
        left -= batch.nbytes
        if left < 0:
            raise LatentsError(
                f"describes rows of over {MAX_RATIO} times what it stores: what follows row "
                f"{number} is not read"
            )
        yield batch
        number += batch.num_rows


def open_parquet(stream: BinaryIO, size: int) -> pq.ParquetFile:
    """A Parquet file of `size` bytes, whose parts announce no more than it can hold.

    Raises LatentsError: no Parquet file, one over the limits, two columns of a name, no pyarrow.
    """
    pa = pyarrow()
    _check_footer(stream, size)
    try:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(
            Window(stream, 0, size),
            pre_buffer=False,
            buffer_size=MIB,  # else a row group's column is read as a whole
            thrift_string_size_limit=MAX_PARQUET_FOOTER,
            thrift_container_size_limit=MAX_PARQUET_FOOTER,
        )
        names = file.schema_arrow.names
        _check_groups(file.metadata, size)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(error) from error
    if len(set(names)) != len(names):
        raise LatentsError(
            "is a table with two columns of the same name, and readers differ on which one counts"
        )
    return file


def pyarrow() -> Any:
    """The module. Raises LatentsError where it is not installed."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise LatentsError(
            "needs pyarrow, which is not installed: pip install 'latentguard[scale]'"
        ) from error
    return pa


def _damaged(error: Exception) -> LatentsError:
    reason = str(error).split("\n", 1)[0][:200]
    return LatentsError(f"is a damaged Parquet file, or of a kind that is not read ({reason})")


def _check_footer(stream: BinaryIO, size: int) -> None:
    """LatentsError unless the file begins and ends as Parquet does, with a footer of some size."""
    stream.seek(0)
    start = stream.read(4)
    if size < 12 or start != _MAGIC:
        raise LatentsError("is not a Parquet file, or is truncated or encrypted")
    stream.seek(size - 8)
    end = read_exactly(stream, 8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC or length > size - 12:
        raise LatentsError("is a truncated or damaged Parquet file: its footer is not at its end")
    if length > MAX_PARQUET_FOOTER:
        raise LatentsError(
            f"has a footer of {length} bytes, over the limit of {MAX_PARQUET_FOOTER}"
        )


def _check_groups(metadata: pq.FileMetaData, size: int) -> None:
    """LatentsError where a part announces more than the file holds, or other rows than it has."""
    rows = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        rows += row_group.num_rows
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            flat = metadata.schema.column(index).max_repetition_level == 0
            if chunk.num_values < row_group.num_rows or (
                flat and chunk.num_values != row_group.num_rows
            ):
                raise LatentsError(
                    f"is a damaged Parquet file: a part of {row_group.num_rows} rows has "
                    f"{chunk.num_values} values"
                )
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            limit = min(MAX_INFLATED, MIN_INFLATED + MAX_RATIO * max(0, packed))
            if not flat:  # a run of equal numbers takes no room in the file
                unpacked = max(unpacked, 4 * chunk.num_values)
            if not 0 <= packed <= size or not 0 <= unpacked <= limit:
                raise LatentsError(
                    f"holds a part of {unpacked} bytes in {packed}, over the limit of {limit}: "
                    "write smaller row groups"
                )
    if rows != metadata.num_rows:
        raise LatentsError(
            f"is a damaged Parquet file: {metadata.num_rows} rows are announced, its parts have "
            f"{rows}"
        )


def batches(file: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some rows of a row group at a time, as many as fit a bound of bytes.

    Of values of any length it is one: a dictionary may repeat a large one in each row. That is
    hardly slower (16 microseconds a row for 14, of 36 kB).

    Raises LatentsError for a damaged part.
    """
    pa = pyarrow()
    row_group = file.metadata.row_group(group)
    rows = max(1, row_group.num_rows)
    each = max(1, row_group.total_byte_size // rows)
    count = max(1, min(_MAX_ROWS, MAX_BATCH_BYTES // each))
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    if any(chunk.physical_type == "BYTE_ARRAY" for chunk in chunks):
        count = 1
    try:
        yield from file.iter_batches(count, row_groups=[group], columns=columns, use_threads=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(error) from error


def _check_heads(
    pa: Any, file: pq.ParquetFile, group: int, table: Table, schema: pa.Schema
) -> None:
    """LatentsError where a column of pictures or text begins a row group with what tensors are."""
    known = (table.latents, *table.unread)
    columns = [f.name for f in schema if _holds_bytes(pa, f.type) and f.name not in known]
    for batch in batches(file, group, columns):
        for name in batch.schema.names if batch.num_rows else ():
            column = batch.column(name)
            value = getattr(column, "storage", column)[0].as_py()
            if isinstance(value, bytes) and begins_as_numbers(value[:512]):
                raise LatentsError(
                    f"holds what could be latents in the column {name[:60]!r}, which is not read: "
                    "name the one that counts (--key)"
                )
        return


# -- columns ---------------------------------------------------------------------------------


def _is_bytes(pa: Any, kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    )


def _is_list(pa: Any, kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _column(pa: Any, field: pa.Field) -> Column:
    kind, name = field.type, str(field.name)
    if isinstance(kind, pa.FixedShapeTensorType):
        order = kind.permutation
        plain = order in (None, list(range(len(kind.shape)))) and _is_number(pa, kind.value_type)
        return Column(name, plain, not plain, tuple(kind.shape))
    if _is_bytes(pa, kind):
        return Column(name, True)
    # Of other types only what can hide nothing is passed over.
    hides = _could_hide(pa, kind) and not Column(name, False).harmless
    axes: list[int | None] = []
    while _is_list(pa, kind):
        axes.append(kind.list_size if pa.types.is_fixed_size_list(kind) else None)
        kind = kind.value_type
    if not axes or not _is_number(pa, kind):
        return Column(name, False, hides)
    sizes = tuple(size for size in axes if size is not None)
    if len(sizes) == len(axes) > 1:
        return Column(name, True, shape=sizes)
    # Lists of lists are boxes or features as often as tokens.
    return Column(name, True, shape=() if len(axes) < 3 else None)


def _unwrapped(pa: Any, kind: pa.DataType) -> pa.DataType:
    """A type without the ways of storing it: dictionaries, runs, extensions."""
    while True:
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def _holds_bytes(pa: Any, kind: pa.DataType) -> bool:
    kind = _unwrapped(pa, kind)
    short = pa.types.is_fixed_size_binary(kind) and kind.byte_width <= _TOO_SHORT
    return (_is_bytes(pa, kind) and not short) or bool(kind == pa.binary_view())


def _could_hide(pa: Any, kind: pa.DataType) -> bool:
    """Whether values of a type that is not read could be arrays, or pickles of them."""
    types, kind, listed = pa.types, _unwrapped(pa, kind), False
    while _is_list(pa, kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        kind, listed = _unwrapped(pa, kind.value_type), True
    if listed and (_is_number(pa, kind) or kind in (pa.uint16(), pa.int16())):
        return True  # the last two may be the bits of bfloat16
    if types.is_fixed_size_binary(kind) and kind.byte_width <= _TOO_SHORT and not listed:
        return False
    known = (
        *(types.is_string, types.is_large_string, types.is_string_view, types.is_boolean),
        *(types.is_integer, types.is_floating, types.is_decimal, types.is_temporal, types.is_null),
    )
    return not any(is_known(kind) for is_known in known)


def _is_number(pa: Any, kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_uint8(kind) or pa.types.is_int8(kind))


def _of_schema(schema: pa.Schema, reading: Reading) -> Claims:
    """What the file says of all of its rows, as text in the metadata of its schema."""
    metadata = schema.metadata or {}
    values: dict[str, str] = {}
    for key in ("space", "scaled", "layout"):
        if key.encode() in metadata:
            values[key] = metadata[key.encode()].decode("utf-8", "replace")
    return Claims.parse(values, text=True, pixels=reading.pixels)


# -- rows ------------------------------------------------------------------------------------


def _row(
    pa: Any,
    batch: pa.RecordBatch,
    place: int,
    number: int,
    table: Table,
    shape: str | None,
    whole: Claims,
    pixels: bool,
    reading: Reading,
) -> Row | LatentsError:
    def value(name: str) -> Any:
        return batch.column(name)[place].as_py()

    try:
        key = None if table.id is None else value(table.id)
        said = {name: value(name) for name in table.claims}
        claims = Claims.parse(said, pixels=pixels).merged(whole, "the row", "the file")
        key = None if key is None else image_id(key)
        sizes = None if shape is None else _sizes(value(shape))
    except LatentsError as error:
        return LatentsError(f"row {number}: {error}")
    cell = batch.column(table.latents)

    def opened(claims: Claims) -> Payload:
        return _payload(pa, cell, place, sizes, claims, reading)

    return Row(f"row {number}", key, claims, opened)


def _sizes(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    good = isinstance(value, list) and 1 <= len(value) <= 5
    if not good or not all(type(n) is int and 0 < n < 2**31 for n in value):
        raise LatentsError(f"shape must be a list of sizes, got {value!r:.60}")
    return tuple(value)


def _payload(
    pa: Any,
    column: pa.Array,
    place: int,
    shape: tuple[int, ...] | None,
    claims: Claims,
    reading: Reading,
) -> Payload:
    cell = column[place]
    if not cell.is_valid:
        raise LatentsError("has no latents: its value is null")
    if _is_bytes(pa, column.type):
        return bytes_payload(cell.as_py(), claims, reading, None)
    if isinstance(column.type, pa.FixedShapeTensorType):
        numbers = _numbers(pa, column.storage[place].values)
        return array_payload(numbers.reshape(tuple(column.type.shape)), claims, reading)
    numbers, nested = _nested(pa, cell)
    if len(nested) == 1:
        numbers = shaped(numbers, shape, claims, reading)
    else:
        numbers = numbers.reshape(nested)
    return array_payload(numbers, claims, reading)


def _nested(pa: Any, cell: Any) -> tuple[np.ndarray[Any, Any], tuple[int, ...]]:
    """The numbers of a list, or of lists of lists of one length on each level, and its shape."""
    import pyarrow.compute as pc

    values = cell.values
    shape = [len(values)]
    while _is_list(pa, values.type):
        inner = values.flatten()
        if values.null_count or len(values) == 0 or len(inner) % len(values):
            raise LatentsError("its lists differ in length, so they are not an array")
        each = len(inner) // len(values)
        if pc.min_max(pc.list_value_length(values)).as_py() != {"min": each, "max": each}:
            raise LatentsError("its lists differ in length, so they are not an array")
        shape.append(each)
        values = inner
    return _numbers(pa, values), tuple(shape)


def _numbers(pa: Any, values: Any) -> np.ndarray[Any, Any]:
    if values.null_count:
        raise LatentsError("some of its numbers are null")
    numbers: np.ndarray[Any, Any] = values.to_numpy(zero_copy_only=False)
    return numbers
