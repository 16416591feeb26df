"""Model files of generated structure: our reader sees what the official parser of onnx sees, or
refuses. Structures have every field that ONNX knows, and some are bent: tags and numbers in other
forms, fields twice, of another type, or unknown."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the official parser is in the export extra")

from google.protobuf.message import DecodeError  # noqa: E402

from latentguard.runtime.layout import MODEL  # noqa: E402
from latentguard.runtime.wire import Layout, WireError, read  # noqa: E402

INT64, INT32, UINT64, FLOAT, DOUBLE, STRING, BYTES, ENUM, MESSAGE = 3, 5, 4, 2, 1, 9, 12, 14, 11
TEXTS = ("", "a", "latents", "com.microsoft", "location", "é", "\u3164", "a\0b", "x" * 130)
NUMBERS = (0, 1, 2, 5, 14, 127, 128, 300, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**64 - 1)


def varint(number: int, padding: int = 0) -> bytes:
    groups = [number & 0x7F]
    while number := number >> 7:
        groups.append(number & 0x7F)
    groups += [0] * padding
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def number_of(chance: random.Random, kind: int) -> int:
    if kind == ENUM:
        return chance.choice([0, 1, 1, 2, 7, 14, 15])
    if kind == INT32 and chance.random() < 0.9:
        return chance.choice([0, 1, 7, 2**31 - 1, 2**64 - 1, 2**64 - 2**31])
    return chance.choice(NUMBERS)


def scalar(chance: random.Random, kind: int) -> bytes:
    """One number without its tag."""
    if kind in (FLOAT, DOUBLE):
        return chance.randbytes(4 if kind == FLOAT else 8)
    return varint(number_of(chance, kind))


Bend = Callable[[random.Random, int, int, bytes], bytes]


def _wide(chance: random.Random, number: int, wire: int, body: bytes) -> bytes:
    return varint(number << 3 | wire | 1 << chance.randrange(32, 63)) + body


def _padded(chance: random.Random, number: int, wire: int, body: bytes) -> bytes:
    return varint(number << 3 | wire, chance.randint(1, 5)) + body


def _another_wire(chance: random.Random, number: int, wire: int, body: bytes) -> bytes:
    return varint(number << 3 | chance.randrange(8)) + body


def _another_number(chance: random.Random, number: int, wire: int, body: bytes) -> bytes:
    return varint(chance.randint(0, 40) << 3 | wire) + body


def _twice(chance: random.Random, number: int, wire: int, body: bytes) -> bytes:
    return (varint(number << 3 | wire) + body) * 2


def _group(chance: random.Random, number: int, wire: int, body: bytes) -> bytes:
    inner = varint(number << 3 | wire) + body
    return varint(number << 3 | 3) + inner + varint(number << 3 | 4)


def _flipped(chance: random.Random, number: int, wire: int, body: bytes) -> bytes:
    data = bytearray(varint(number << 3 | wire) + body)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _cut(chance: random.Random, number: int, wire: int, body: bytes) -> bytes:
    data = varint(number << 3 | wire) + body
    return data[: chance.randrange(len(data))]


BENDS: tuple[Bend, ...] = (
    _wide,
    _padded,
    _another_wire,
    _another_number,
    _twice,
    _group,
    _flipped,
    _cut,
)


class Writer:
    """Bytes of one structure. bend: how likely a field is bent."""

    def __init__(self, chance: random.Random, bend: float) -> None:
        self._chance = chance
        self._bend = bend

    def message(self, layout: Any, ours: Layout | None, depth: int = 0) -> bytes:
        """A message of an official descriptor. ours: fields that are refused become rare."""
        chance, parts = self._chance, []
        for field in layout.fields:
            spec = None if ours is None else ours.fields.get(field.number)
            foreign = spec is None or spec.refused is not None
            if chance.random() > (0.01 if foreign else 0.45) or depth > 5:
                continue
            count = chance.randint(1, 3) if field.is_repeated and not field.is_packed else 1
            parts += [self._field(field, spec, depth) for _ in range(count)]
        chance.shuffle(parts)
        return b"".join(parts)

    def _field(self, field: Any, spec: Any, depth: int) -> bytes:
        chance, kind, wire = self._chance, field.type, 2
        if kind == MESSAGE:
            inner = self.message(field.message_type, spec and spec.of, depth + 1)
        elif kind in (STRING, BYTES):
            text = chance.choice(TEXTS).encode()
            inner = text if kind == STRING else text + chance.randbytes(3)
        elif field.is_packed:
            inner = b"".join(scalar(chance, kind) for _ in range(chance.randint(0, 4)))
        else:
            wire, inner = {FLOAT: 5, DOUBLE: 1}.get(kind, 0), scalar(chance, kind)
        padding = chance.randint(1, 3) if chance.random() < self._bend else 0
        body = varint(len(inner), padding) + inner if wire == 2 else inner
        if chance.random() < self._bend:
            return chance.choice(BENDS)(chance, field.number, wire, body)
        return varint(field.number << 3 | wire) + body


def official(message: Any) -> dict[str, Any]:
    """What the official parser sees, in the form of our reader; numbers that are packed, as a list
    of them."""
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.type == MESSAGE:
            each = [official(one) for one in value] if field.is_repeated else official(value)
        elif field.type == FLOAT and not field.is_packed:
            each = [_bits(v) for v in value] if field.is_repeated else _bits(value)
        elif field.type == DOUBLE or field.is_packed:
            each = np.array(value, PACKED.get(field.type, np.int64)).tobytes()
        else:
            each = list(value) if field.is_repeated else value
        found[field.name] = each
    return found


PACKED = {FLOAT: np.float32, DOUBLE: np.float64, UINT64: np.uint64}


def ours(message: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The same of what our reader sees."""
    specs = {spec.name: spec for spec in layout.fields.values()}
    found: dict[str, Any] = {}
    for name, value in message.items():
        spec = specs[name]
        values = value if isinstance(value, list) else [value]
        each: Any
        if spec.of is not None:
            each = [ours(one, spec.of) for one in values]
        elif spec.packed:
            found |= {name: joined} if (joined := _joined(spec.kind, values)) else {}
            continue
        elif spec.kind == "bytes":
            each = [bytes(one) for one in values]
        else:
            each = [_bits(one) if spec.kind == "float" else one for one in values]
        found[name] = each if isinstance(value, list) else each[0]
    return found


def _bits(value: float) -> bytes:
    # Which NaN it is may change from float to double and back.
    return b"nan" if value != value else struct.pack("<f", value)


def _joined(kind: str, views: list[memoryview]) -> bytes:
    data = b"".join(views)
    if kind in ("float", "double"):
        return data
    numbers, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    signed = [n - 2**64 if n >> 63 and kind != "uint64" else n for n in numbers]
    return np.array(signed, np.uint64 if kind == "uint64" else np.int64).tobytes()


def outcome(data: bytes) -> str:
    """agreed, refused or disagreed."""
    try:
        found = read(data, MODEL)
    except WireError:
        return "refused"
    try:
        parsed = onnx.ModelProto.FromString(data)
    except DecodeError:
        return "disagreed"
    return "agreed" if ours(found, MODEL) == official(parsed) else "disagreed"


def structures(seed: int, count: int) -> Counter[str]:
    """Counts of `count` structures: tried, agreed, refused, disagreed."""
    counts = Counter(tried=0, agreed=0, refused=0, disagreed=0)
    for index in range(count):
        chance = random.Random(f"{seed} {index}")
        writer = Writer(chance, chance.choice([0, 0, 0.01, 0.1]))
        counts["tried"] += 1
        counts[outcome(writer.message(onnx.ModelProto.DESCRIPTOR, MODEL))] += 1
    return counts


def test_our_reader_sees_what_the_official_parser_sees() -> None:
    counts = structures(seed=0, count=600)
    assert counts["disagreed"] == 0
    assert counts["agreed"] > 100
    assert counts["refused"] > 100
    assert counts["tried"] == 600


def test_every_field_of_onnx_is_known_by_its_number() -> None:
    """A field that a newer ONNX has is refused until somebody has looked at it."""

    def same(layout: Layout, descriptor: Any) -> None:
        theirs = {field.number: field for field in descriptor.fields}
        for number, spec in layout.fields.items():
            if number not in theirs:  # of a newer version than the one that is installed
                assert spec.refused is not None
                continue
            field = theirs[number]
            assert (field.name, field.is_packed) == (spec.name, spec.packed)
            assert spec.refused is not None or field.is_repeated == (spec.repeated or spec.packed)
            if spec.of is not None:
                same(spec.of, field.message_type)

    same(MODEL, onnx.ModelProto.DESCRIPTOR)
