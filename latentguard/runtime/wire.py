"""A strict, bounded reader of protocol buffers' wire format, for model files.

Readers of protocol buffers interpret unusual bytes differently: one cuts a field's number to 29
bits, another takes it for an unknown field and skips it. So only the form that the ONNX tools write
is read, because all readers agree on it. Everything else is refused: numbers in more bytes than
they need, unknown fields, groups, a second value of a field that has one.

(The encoding: https://protobuf.dev/programming-guides/encoding.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["int64", "int32", "uint64", "float", "double", "string", "bytes", "message"]

MAX_FIELDS = 500_000
"""Fields that a file may have, those of all its messages together; nano-flux2's has 9,637. Each is
a Python object of its own for a moment."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE: dict[Kind, int] = {
    "int64": _VARINT,
    "int32": _VARINT,
    "uint64": _VARINT,
    "float": _FIXED32,
    "double": _FIXED64,
    "string": _BYTES,
    "bytes": _BYTES,
    "message": _BYTES,
}
_WIDTH: dict[Kind, int] = {"float": 4, "double": 8}
_MAX_TAG = 2**32


class WireError(ValueError):
    """The bytes are no protocol buffer, or one that readers would understand differently."""


class Spec(NamedTuple):
    """A field that a message may have.

    of: the message's layout where `kind` is message. choice: at most one of the fields of a message
    with the same choice may be there. values: those that an integer may have, None for all.
    refused: what a file with this field holds, where none of ours has it.
    """

    name: str
    kind: Kind = "message"
    repeated: bool = False
    packed: bool = False
    of: Layout | None = None
    choice: str | None = None
    values: range | None = None
    refused: str | None = None


class Layout(NamedTuple):
    """The fields of one kind of message, by their numbers."""

    name: str
    fields: Mapping[int, Spec]


class Field(NamedTuple):
    """number, wire type; value: an int, or None where bytes from `begin` to `end` are the value;
    start: where the field itself begins. It ends at `end`."""

    number: int
    wire: int
    value: int | None
    start: int
    begin: int
    end: int


Message = dict[str, Any]
"""Values by the names of fields: int (signed), float, str, memoryview of bytes, Message, and lists
of these for repeated fields. Packed numbers are the memoryviews of their bytes."""


def read(data: bytes, layout: Layout) -> Message:
    """A whole file as one message. Raises WireError for whatever is not in the strict form."""
    return _Reader(data).message(layout, 0, len(data))


def fields(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of one message, in their order. Raises WireError where the bytes are damaged."""
    position, end = start, len(data) if end is None else end
    while position < end:
        start = position
        key, position = _varint(data, position, end)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {start}")
        if key >= _MAX_TAG:
            raise WireError(f"a field number of more than 29 bits at byte {start}")
        if wire == _VARINT:
            begin = position
            value, position = _varint(data, position, end)
            yield Field(number, wire, value, start, begin, position)
            continue
        if wire == _BYTES:
            size, position = _varint(data, position, end)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise WireError(f"wire type {wire} at byte {start}")
        if size > end - position:
            raise WireError(
                f"{size} bytes announced at byte {position}, {max(0, end - position)} left"
            )
        begin, position = position, position + size
        yield Field(number, wire, None, start, begin, position)


def text(data: bytes, item: Field) -> str:
    """A string field. Raises WireError for a number, or bytes that are not UTF-8."""
    if item.value is not None:
        raise WireError(f"a number where bytes are expected at byte {item.start}")
    try:
        return data[item.begin : item.end].decode()
    except UnicodeDecodeError as error:
        raise WireError(f"text that is not UTF-8 at byte {item.start}") from error


class _Reader:
    """Reads one file; counts its fields."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._view = memoryview(data)
        self._left = MAX_FIELDS

    def message(self, layout: Layout, start: int, end: int) -> Message:
        found: Message = {}
        chosen: set[str] = set()
        for item in fields(self._data, start, end):
            self._left -= 1
            if self._left < 0:
                raise WireError(f"more than {MAX_FIELDS:,} fields")
            spec = layout.fields.get(item.number)
            if spec is None:
                raise WireError(
                    f"field {item.number} at byte {item.start}, which a {layout.name} does not have"
                )
            if spec.refused is not None:
                raise ForeignError(f"holds {spec.refused}, which no export of ours has")
            value = self._value(spec, item)
            if spec.repeated or spec.packed:
                found.setdefault(spec.name, []).append(value)
                continue
            if spec.name in found:
                raise WireError(f"holds more than one {spec.name} in a {layout.name}")
            if spec.choice is not None:
                if spec.choice in chosen:
                    raise WireError(f"holds more than one {spec.choice} in a {layout.name}")
                chosen.add(spec.choice)
            found[spec.name] = value
        return found

    def _value(self, spec: Spec, item: Field) -> Any:
        wire = _BYTES if spec.packed else _WIRE[spec.kind]
        if item.wire != wire:
            what = (
                "a number where bytes are" if wire == _BYTES else f"wire type {item.wire}, {wire}"
            )
            raise WireError(f"{what} expected at byte {item.start} ({spec.name})")
        if spec.packed:
            view = self._view[item.begin : item.end]
            _check_packed(spec, view)
            return view
        if item.value is not None:
            return _number(spec, item.value)
        if spec.of is not None:
            return self.message(spec.of, item.begin, item.end)
        if spec.kind == "string":
            return text(self._data, item)
        view = self._view[item.begin : item.end]
        return struct.unpack("<f", view)[0] if spec.kind == "float" else view


class ForeignError(WireError):
    """A protocol buffer that holds what no export has; the message is a clause about the file."""


def _number(spec: Spec, value: int) -> int:
    """A signed integer, in the range of its kind."""
    signed = value - (1 << 64) if value >> 63 and spec.kind != "uint64" else value
    if spec.kind == "int32" and not -(2**31) <= signed < 2**31:
        raise WireError(f"{signed} in {spec.name}, which has 32 bits")
    if spec.values is not None and signed not in spec.values:
        raise WireError(f"{signed} in {spec.name}, which does not have this value")
    return signed


def _check_packed(spec: Spec, view: memoryview) -> None:
    """Raise WireError where readers could see other numbers than were written."""
    if spec.kind in _WIDTH:
        if len(view) % _WIDTH[spec.kind]:
            raise WireError(f"{len(view)} bytes of {spec.name}")
        return
    data = np.frombuffer(view, np.uint8)
    if len(data) == 0:
        return
    ends = np.flatnonzero(data < 0x80)
    if len(ends) == 0 or ends[-1] != len(data) - 1:
        raise WireError(f"{spec.name} ends within a number")
    sizes = np.diff(ends, prepend=-1)
    longer = ends[sizes > 1]
    full = ends[sizes == 10]
    if sizes.max() > 10 or (data[longer] == 0).any() or (data[full] > 1).any():
        raise WireError(f"a number in {spec.name} that is longer than it needs to be")
    if spec.kind == "int32":
        # 31 bits, or a negative number of 32 with its sign in all of the others.
        upper = data[ends[sizes == 5]] > 0x07
        sign = (data[full - 5] & 0xF8) != 0xF8
        rest = [data[full - back] != 0xFF for back in (1, 2, 3, 4)]
        between = (sizes > 5) & (sizes < 10)
        if upper.any() or between.any() or sign.any() or any(part.any() for part in rest):
            raise WireError(f"a number in {spec.name} of more than 32 bits")


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """A number and the position behind it."""
    if position < end and data[position] < 0x80:
        return data[position], position + 1
    value = shift = 0
    while True:
        if position >= end:
            raise WireError("the data ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift >= 70:
            raise WireError(f"a number of more than ten bytes before byte {position}")
    if byte == 0 and shift:
        raise WireError(f"a number that is longer than it needs to be before byte {position}")
    if value >> 64:
        raise WireError(f"a number of more than 64 bits before byte {position}")
    return value, position
