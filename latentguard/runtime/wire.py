"""A bounded reader of protocol buffers' wire format: just enough to look into a model file.

(The encoding: https://protobuf.dev/programming-guides/encoding. The field numbers of ModelProto and
its parts: onnx.proto of the ONNX specification.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """number; value: an int, or a view of the bytes; raw: the field as it stands in the file."""

    number: int
    value: int | memoryview
    raw: memoryview


class WireError(ValueError):
    """The bytes are no protocol buffer."""


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of one message, in their order. Raises WireError where the bytes are damaged."""
    position, end = 0, len(data)
    while position < end:
        start = position
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {start}")
        value: int | memoryview
        if kind == _VARINT:
            value, position = _varint(data, position)
        elif kind == _BYTES:
            size, position = _varint(data, position)
            value, position = _take(data, position, size)
        elif kind in (_FIXED64, _FIXED32):
            value, position = _take(data, position, 8 if kind == _FIXED64 else 4)
        else:
            raise WireError(f"wire type {kind} at byte {start}")
        yield Field(number, value, data[start:position])


def text(value: int | memoryview) -> str:
    """A string field. Raises WireError for a number, or bytes that are not UTF-8."""
    try:
        return bytes(_view(value)).decode()
    except UnicodeDecodeError as error:
        raise WireError("text that is not UTF-8") from error


def message(value: int | memoryview) -> memoryview:
    """An embedded message. Raises WireError for a number."""
    return _view(value)


def numbers(value: int | memoryview) -> list[int]:
    """A repeated integer field, packed or not."""
    if isinstance(value, int):
        return [value]
    found, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        found.append(number)
    return found


def _view(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise WireError("a number where bytes are expected")
    return value


def _take(data: memoryview, position: int, size: int) -> tuple[memoryview, int]:
    if size > len(data) - position:
        raise WireError(f"{size} bytes announced at byte {position}, {len(data) - position} left")
    return data[position : position + size], position + size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise WireError("the data ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WireError(f"a number of more than ten bytes before byte {position}")
