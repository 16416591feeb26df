"""Zip archives (.pt, .npz) in the one form that every reader reads alike.

The format lets an archive say most things twice: the table of contents may stand where the end
record says or directly before it, a part has a header beside its entry in the table, sizes come in
32 and in 64 bits. torch's reader, Python's zipfile and others each believe another one of the two.
So an archive is read only if the two agree, and if every byte of it belongs to one part.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_ZIP_DIRECTORY
from latentguard.files.streams import Window, read_exactly

STORED, DEFLATED = 0, 8
_CHUNK = 64 * 1024
_END, _LOCATOR, _END64, _ENTRY, _LOCAL = 22, 20, 56, 46, 30
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 0x8, 0x800
# Compression levels (bits 1 and 2) say nothing to a reader. Bit 0 is encryption.
_FLAGS = 0x2 | 0x4 | _DESCRIPTOR | _UTF8
# What mature readers support; Python's zipfile refuses what needs more.
_MAX_VERSION = 63
_DIRECTORY_ATTRIBUTE = 0x10
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075


@dataclass(frozen=True)
class Entry:
    """One part of an archive.

    header, begin: bytes of the file at which its local header and its content start. packed, size:
    bytes in the file and once unpacked (equal where `method` is STORED). crc: of what is unpacked.
    """

    name: str
    method: int
    crc: int
    packed: int
    size: int
    header: int
    begin: int


@dataclass(frozen=True)
class _Listed:
    """An entry of the table of contents, as it stands there."""

    raw_name: bytes
    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


def read_archive(stream: BinaryIO, size: int) -> list[Entry]:
    """The parts of an archive of `size` bytes, in the order in which they lie in the file.

    Raises:
        LatentsError: no zip archive, a table of contents over the limit, or anything that two
            readers could read differently: a comment, bytes that belong to no part, parts that
            overlap, a header that differs from the table of contents.
    """
    start, end, count = _directory(stream, size)
    stream.seek(start)
    listed = sorted(_table(read_exactly(stream, end - start), count), key=lambda e: e.header)
    entries: list[Entry] = []
    position = 0
    for index, item in enumerate(listed):
        after = listed[index + 1].header if index + 1 < len(listed) else start
        entries.append(_located(stream, item, position, after))
        position = after
    if not listed and start:
        raise LatentsError(f"is a damaged zip archive: no part owns its first {start} bytes")
    return entries


def entry_stream(stream: BinaryIO, entry: Entry) -> BinaryIO:
    """What a part of an .npz holds, unpacked, to be read once from its start to its end.

    Reading raises LatentsError where it does not unpack to the size and checksum that are stated.
    """
    return io.BufferedReader(_Content(stream, entry))


class _Content(io.RawIOBase):
    """A part's content, inflated and summed up while it is read."""

    def __init__(self, stream: BinaryIO, entry: Entry) -> None:
        self._packed = Window(stream, entry.begin, entry.packed)
        self._entry = entry
        self._inflate = zlib.decompressobj(-15) if entry.method == DEFLATED else None
        self._left, self._crc = entry.size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self._left)
        if wanted == 0:
            return 0
        data = self._next(wanted)
        if not data:
            raise LatentsError(f"is a damaged .npz: {self._entry.name[:60]!r} ends too early")
        buffer[: len(data)] = data
        self._left -= len(data)
        self._crc = zlib.crc32(data, self._crc)
        if self._left == 0 and self._crc != self._entry.crc:
            raise LatentsError(f"is a damaged .npz: Bad CRC-32 for {self._entry.name[:60]!r}")
        return len(data)

    def _next(self, wanted: int) -> bytes:
        """Some of the content, `wanted` bytes at most; none where it has ended."""
        if self._inflate is None:
            return self._packed.read(wanted) or b""
        try:
            while True:
                packed = self._inflate.unconsumed_tail or self._packed.read(_CHUNK) or b""
                data = self._inflate.decompress(packed, wanted)
                if data or not packed or self._inflate.eof:
                    return data
        except zlib.error as error:
            raise LatentsError(f"is a damaged .npz: {self._entry.name[:60]!r} ({error})") from error


def _directory(stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Where the table of contents starts and ends, and how many entries it has."""
    if size < _END:
        raise LatentsError("is not a zip archive, or is truncated")
    stream.seek(size - _END)
    signature, disk, first, here, count, length, start, comment = struct.unpack(
        "<4s4H2LH", read_exactly(stream, _END)
    )
    # Neither torch.save nor numpy writes a comment behind the end record, so it is the end.
    if signature != b"PK\x05\x06" or comment != 0:
        raise LatentsError("is not a zip archive, or is truncated")
    end, values = size - _END, (count, length, start)
    large = _directory64(stream, end)
    if large is not None:
        end -= _END64 + _LOCATOR
        for value, stated, full in zip(large, values, (_FULL16, _FULL32, _FULL32), strict=True):
            if stated not in (value, full):
                raise LatentsError("is a damaged zip archive: its two end records differ")
        here, count = (large[0] if n == _FULL16 else n for n in (here, count))
        count, length, start = large
    if length > MAX_ZIP_DIRECTORY:
        raise LatentsError(
            f"has a table of contents of {length} bytes, over the limit of {MAX_ZIP_DIRECTORY}"
        )
    if disk or first or here != count:
        raise LatentsError("is a part of a zip archive in several files")
    if start + length != end:
        raise LatentsError(
            f"is a damaged zip archive: its table of contents ends at byte {start + length}, its "
            f"end record is at byte {end}, and readers differ on which one counts"
        )
    return start, end, count


def _directory64(stream: BinaryIO, end: int) -> tuple[int, int, int] | None:
    """Count, length and start by the 64-bit end record, None where there is none."""
    if end < _LOCATOR + _END64:
        return None
    stream.seek(end - _LOCATOR - _END64)
    data = read_exactly(stream, _LOCATOR + _END64)
    signature, disk, at, disks = struct.unpack_from("<4sLQL", data, _END64)
    if signature != b"PK\x06\x07":
        return None
    record = struct.unpack_from("<4sQ2H2L4Q", data)
    signature, length, _, version, this, first, here, count, directory, start = record
    if signature != b"PK\x06\x06" or at != end - _LOCATOR - _END64 or length != _END64 - 12:
        raise LatentsError("is a damaged zip archive: its zip64 end record is not at its end")
    if disk or disks != 1 or this or first or here != count or version > _MAX_VERSION:
        raise LatentsError("is a part of a zip archive in several files")
    return count, directory, start


def _table(data: bytes, count: int) -> list[_Listed]:
    listed: list[_Listed] = []
    at = 0
    while at < len(data):
        if len(data) - at < _ENTRY or data[at : at + 4] != b"PK\x01\x02":
            raise LatentsError("is a damaged zip archive: its table of contents cannot be read")
        fields = struct.unpack_from("<4H2H3L5H2L", data, at + 4)
        _, version, flags, method, _, _, crc, packed, size = fields[:9]
        name_length, extra_length, comment_length, disk, _, attributes, header = fields[9:]
        begin = at + _ENTRY
        at = begin + name_length + extra_length + comment_length
        raw_name = data[begin : begin + name_length]
        name = _name(raw_name, flags)
        if at > len(data):
            raise LatentsError("is a damaged zip archive: its table of contents cannot be read")
        if flags & ~_FLAGS or version & 0xFF > _MAX_VERSION or disk:
            raise LatentsError(f"holds {name[:60]!r} encrypted, or as no reader here takes it")
        if attributes & _DIRECTORY_ATTRIBUTE or name.endswith("/"):
            raise LatentsError(f"holds the folder {name[:60]!r}: only files are expected in it")
        extra = data[begin + name_length : begin + name_length + extra_length]
        size, packed, header = _large(extra, (size, packed, header), name)
        if method == STORED and packed != size:
            raise LatentsError(f"is a damaged zip archive: two sizes of {name[:60]!r}")
        listed.append(_Listed(raw_name, name, flags, method, crc, packed, size, header))
    if len(listed) != count:
        raise LatentsError(
            f"is a damaged zip archive: {count} parts are announced, {len(listed)} are listed"
        )
    return listed


def _name(raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise LatentsError("is a damaged zip archive: the name of a part is no text") from error
    # Readers cut a name at a zero byte, and some take a backslash for a slash.
    if not name or "\0" in name or "\\" in name:
        raise LatentsError(f"is a damaged zip archive: it holds a part named {name[:60]!r}")
    return name


def _large(
    extra: bytes, values: tuple[int, ...], name: str, local: bool = False
) -> tuple[int, ...]:
    """Sizes and positions, those of 64 bits taken from the extra field where 32 do not hold them.

    An extra field of 64-bit numbers that is not needed, or holds more than it must, is refused.
    """
    needed = values.count(_FULL32)
    found = None
    at = 0
    while at < len(extra):
        kind, length = (
            struct.unpack_from("<2H", extra, at) if len(extra) - at >= 4 else (0, _FULL16)
        )
        if at + 4 + length > len(extra) or kind == _UNICODE_PATH or (kind == _ZIP64 and found):
            raise LatentsError(f"is a damaged zip archive: the extra field of {name[:60]!r}")
        if kind == _ZIP64:
            found = extra[at + 4 : at + 4 + length]
        at += 4 + length
    # torch writes one into local headers that leave their sizes to a descriptor, too.
    if local and not needed:
        return values
    if len(found or b"") != 8 * needed:
        raise LatentsError(f"is a damaged zip archive: the 64-bit sizes of {name[:60]!r}")
    numbers = iter(struct.unpack(f"<{needed}Q", found or b""))
    return tuple(next(numbers) if value == _FULL32 else value for value in values)


def _located(stream: BinaryIO, item: _Listed, position: int, after: int) -> Entry:
    """The entry, whose local header must be at `position` and whose last byte before `after`."""
    shown = item.name[:60]
    if item.header != position:
        raise LatentsError(
            f"is a damaged zip archive: {shown!r} begins at byte {item.header}, not behind what is "
            f"before it, at byte {position}"
        )
    fixed = _LOCAL + len(item.raw_name)
    # The part of the header before its extra field; the table of contents lies behind it.
    stream.seek(position)
    data = read_exactly(stream, fixed)
    signature, version, flags, method, _, _, crc, packed, size, name_length, extra_length = (
        struct.unpack_from("<4s5H3L2H", data)
    )
    begin = position + fixed + extra_length
    if signature != b"PK\x03\x04" or begin + item.packed > after:
        raise LatentsError(f"is a damaged zip archive: {shown!r} is not there, or is truncated")
    size, packed = _large(read_exactly(stream, extra_length), (size, packed), shown, local=True)
    same = (
        data[_LOCAL:] == item.raw_name
        and name_length == len(item.raw_name)
        and (flags, method) == (item.flags, item.method)
        and version & 0xFF <= _MAX_VERSION
    )
    # Who writes a descriptor behind the content may leave these zero in front of it.
    later = bool(flags & _DESCRIPTOR) and (crc, packed, size) == (0, 0, 0)
    if not same or not (later or (crc, packed, size) == (item.crc, item.packed, item.size)):
        raise LatentsError(
            f"is a damaged zip archive: {shown!r} has a header that says otherwise than the table "
            "of contents"
        )
    if not _ends(stream, item, begin + item.packed, after):
        raise LatentsError(f"is a damaged zip archive: bytes behind {shown!r} belong to no part")
    return Entry(item.name, item.method, item.crc, item.packed, item.size, item.header, begin)


def _ends(stream: BinaryIO, item: _Listed, end: int, after: int) -> bool:
    """Whether nothing lies between an entry's content and `after` but its descriptor."""
    if not item.flags & _DESCRIPTOR:
        return end == after
    if end == after:
        return item.size == 0  # torch writes none behind an empty part
    kind = {16: "<4s3L", 24: "<4sL2Q"}.get(after - end)
    if kind is None:
        return False
    stream.seek(end)
    values = struct.unpack(kind, read_exactly(stream, after - end))
    return values == (b"PK\x07\x08", item.crc, item.packed, item.size)
