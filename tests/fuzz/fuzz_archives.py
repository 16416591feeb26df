"""Zip archives built field by field, with faults of which each reader may believe another side."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass
class Part:
    """One part; `local` and `central` replace fields of its two headers."""

    name: bytes
    content: bytes
    method: int = 0
    descriptor: str = ""  # a struct format, empty for none
    before: bytes = b""
    local_extra: bytes = b""
    central_extra: bytes = b""
    local: dict[str, int | bytes] = field(default_factory=dict)
    central: dict[str, int | bytes] = field(default_factory=dict)
    listed: int = 1

    def __post_init__(self) -> None:
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        plain = self.content
        self.packed = deflate.compress(plain) + deflate.flush() if self.method == 8 else plain


@dataclass
class Archive:
    parts: list[Part]
    zip64: bool = False
    end: dict[str, int] = field(default_factory=dict)
    end64: dict[str, int] = field(default_factory=dict)
    before_directory: bytes = b""
    after_directory: bytes = b""
    comment: bytes = b""
    tail: bytes = b""

    def build(self) -> bytes:
        body, directory, count = b"", b"", 0
        for part in self.parts:
            body += part.before
            values = self._values(part, len(body))
            local = {**values, **part.local}
            if part.descriptor and "crc" not in part.local:
                local.update(crc=0, packed=0, size=0, flags=int(values["flags"]))
            body += _header("<4s5H3L2H", b"PK\x03\x04", local, part.local_extra) + part.packed
            if part.descriptor:
                marks = [b"PK\x07\x08"] if "4s" in part.descriptor else []
                body += struct.pack(
                    part.descriptor, *marks, values["crc"], values["packed"], values["size"]
                )
            central = {**values, **part.central}
            for _ in range(part.listed):
                directory += _header("<4s6H3L5H2L", b"PK\x01\x02", central, part.central_extra)
                count += 1
        body += self.before_directory
        end = {"count": count, "length": len(directory), "start": len(body)}
        raw = body + directory + self.after_directory
        if self.zip64:
            large = {**end, **self.end64}
            at = len(raw)
            raw += struct.pack(
                "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, large["count"], large["count"],
                large["length"], large["start"],
            )  # fmt: skip
            raw += struct.pack("<4sLQL", b"PK\x06\x07", 0, large.get("at", at), 1)
        end.update(self.end)
        raw += struct.pack(
            "<4s4H2LH", b"PK\x05\x06", 0, 0, end["count"], end["count"], end["length"],
            end["start"], len(self.comment),
        )  # fmt: skip
        return raw + self.comment + self.tail

    @staticmethod
    def _values(part: Part, offset: int) -> dict[str, int | bytes]:
        return {
            "version": 20,
            "flags": 0x808 if part.descriptor else 0,
            "method": part.method,
            "crc": zlib.crc32(part.content),
            "packed": len(part.packed),
            "size": len(part.content),
            "name": part.name,
            "attributes": 0,
            "disk": 0,
            "offset": offset,
        }


def _header(form: str, signature: bytes, values: dict[str, int | bytes], extra: bytes) -> bytes:
    name = values["name"]
    assert isinstance(name, bytes)
    common = [values["version"], values["flags"], values["method"], 0, 33]
    sizes = [values["crc"], values["packed"], values["size"]]
    lengths = [len(name), len(extra)]
    if signature == b"PK\x03\x04":
        packed = struct.pack(form, signature, *common, *sizes, *lengths)
    else:
        rest = [0, values["disk"], 0, values["attributes"], values["offset"]]
        packed = struct.pack(form, signature, 20, *common, *sizes, *lengths, *rest)
    return packed + name + extra


Fault = Callable[[random.Random, Archive], None]


def _field(chance: random.Random, fields: dict[str, int | bytes], part: Part) -> None:
    """Another value of one header field."""
    kind = chance.choice(["flags", "method", "crc", "packed", "size", "name", "version"])
    other: dict[str, int | bytes] = {
        "flags": chance.choice([0, 1, 2, 8, 0x800, 0x808, 0x2000]),
        "method": chance.choice([0, 8, 12]),
        "crc": chance.choice([0, 1, zlib.crc32(part.content)]),
        "packed": chance.choice([0, len(part.packed) + chance.randint(-9, 9), FULL32]) & FULL32,
        "size": chance.choice([0, len(part.content) + chance.randint(-9, 9), FULL32]) & FULL32,
        "name": chance.choice([part.name.upper(), part.name + b"\0x", b"x" + part.name[1:], b""]),
        "version": chance.choice([0, 10, 45, 63, 64, 90]),
    }
    fields[kind] = other[kind]


def local_field(chance: random.Random, archive: Archive) -> None:
    part = chance.choice(archive.parts)
    _field(chance, part.local, part)


def central_field(chance: random.Random, archive: Archive) -> None:
    part = chance.choice(archive.parts)
    if chance.random() < 0.5:
        _field(chance, part.central, part)
    else:
        kind = chance.choice(["attributes", "disk", "offset"])
        values = {"attributes": [0x10, 0x20, 0x81A40000], "disk": [1], "offset": [0, 30, 64]}
        part.central[kind] = chance.choice(values[kind])


def both_fields(chance: random.Random, archive: Archive) -> None:
    part = chance.choice(archive.parts)
    _field(chance, part.local, part)
    part.central.update(part.local)


def gap(chance: random.Random, archive: Archive) -> None:
    part = chance.choice(archive.parts)
    part.before = chance.choice([b"\0", b"\0" * 64, b"PK\x03\x04" + b"\0" * 40])


def around_directory(chance: random.Random, archive: Archive) -> None:
    name = chance.choice(["before_directory", "after_directory"])
    setattr(archive, name, chance.choice([b"\0", b"\0" * 46, b"PK\x01\x02" + b"\0" * 42]))


def extra(chance: random.Random, archive: Archive) -> None:
    part = chance.choice(archive.parts)
    size = len(part.content)
    path = b"\x01" + struct.pack("<L", zlib.crc32(part.name)) + part.name[:-1] + b"X"
    padding = chance.randrange(40)
    value = chance.choice(
        [
            struct.pack("<2H", 0x4246, padding) + b"Z" * padding,
            struct.pack("<2H2Q", 1, 16, size, size),
            struct.pack("<2HQ", 1, 8, chance.choice([size, size + 8, 0])),
            struct.pack("<2H", 1, 0),
            struct.pack("<2H", 0x7075, len(path)) + path,
            b"\0" * chance.randrange(1, 6),
            struct.pack("<2H", 0x5455, 99),
        ]
    )
    if chance.random() < 0.5:
        part.local_extra = value
    else:
        part.central_extra = value
    if chance.random() < 0.3:
        fields = part.local if value is part.local_extra else part.central
        fields.update(size=FULL32, packed=FULL32)


def listing(chance: random.Random, archive: Archive) -> None:
    chance.choice(archive.parts).listed = chance.choice([0, 2])


def descriptor(chance: random.Random, archive: Archive) -> None:
    form = chance.choice(["<4s3L", "<4sL2Q", "<3L", "<L2Q"])
    for part in archive.parts if chance.random() < 0.5 else [chance.choice(archive.parts)]:
        part.descriptor = form


def end_record(chance: random.Random, archive: Archive) -> None:
    kind = chance.choice(["count", "length", "start"])
    archive.zip64 = chance.random() < 0.5
    fields = archive.end64 if archive.zip64 and chance.random() < 0.5 else archive.end
    fields[kind] = chance.choice([0, 1, 30, 46, FULL16, FULL32 if kind != "count" else FULL16])


def large_end(chance: random.Random, archive: Archive) -> None:
    archive.zip64 = True
    if chance.random() < 0.3:
        archive.end = {"count": FULL16, "length": FULL32, "start": FULL32}


def tail(chance: random.Random, archive: Archive) -> None:
    value = chance.choice([b"\0", b"x" * 22, b"PK\x05\x06" + b"\0" * 18])
    if chance.random() < 0.5:
        archive.comment = value
    else:
        archive.tail = value


def repeated(chance: random.Random, archive: Archive) -> None:
    """A part of the same name, or one that differs in case, with other content."""
    part = chance.choice(archive.parts)
    changed = bytes(b ^ 1 for b in part.content)
    name = chance.choice([part.name, part.name.swapcase(), part.name + b".npy"])
    archive.parts.insert(chance.randrange(len(archive.parts) + 1), Part(name, changed, part.method))


def shared(chance: random.Random, archive: Archive) -> None:
    """An entry that points to another one's bytes."""
    first, second = chance.choice(archive.parts), chance.choice(archive.parts)
    first.central["offset"] = sum(
        len(p.before) + 30 + len(p.name) + len(p.local_extra) + len(p.packed)
        for p in archive.parts[: archive.parts.index(second)]
    )


def shuffled(chance: random.Random, archive: Archive) -> None:
    chance.shuffle(archive.parts)


FAULTS: tuple[Fault, ...] = (
    local_field, central_field, both_fields, gap, around_directory, extra, listing, descriptor,
    end_record, large_end, tail, repeated, shared, shuffled,
)  # fmt: skip


def two_directories(first: Archive, second: Archive) -> bytes:
    """Both archives, one behind the other; the end record points to the first one's directory."""
    one, other = first.build(), second.build()
    end = struct.unpack("<4s4H2LH", one[-22:])
    return one[:-22] + other[:-22] + struct.pack("<4s4H2LH", *end)


def prefixed(data: bytes, prefix: bytes) -> bytes:
    """Bytes in front, which move everything from where it is said to be."""
    return prefix + data
