"""The members of a tar archive as Python's tarfile names and places them, or why they are not read.

Tar has many dialects, and a header that one reader believes is ignored by another. Members are read
as tarfile reads them, with or without seeking ("r" and "r|", which WebDataset uses). A member that
only tarfile would read, or that its versions or other readers would place or name differently, is
an error that names the member.

tarfile ends silently at the first damaged header and at the first empty block. A guard must not do
this: the walk resumes at the next valid header, and the lost part is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_METADATA, MAX_SHARD_GAPS, MIB
from latentguard.files.streams import read_exactly

BLOCK = 512
_EMPTY = bytes(BLOCK)
_EMPTY_MIB = bytes(MIB)

_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
_PAX, _SOLARIS_PAX, _GLOBAL_PAX = b"x", b"X", b"g"
_FILES = (b"0", b"\0", b"7")
_FOLDER = b"5"
# What has no data, whatever size its header states.
_WITHOUT_DATA = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    _FOLDER: "a folder",
    b"6": "a FIFO",
}
# A stream reader unpacks what begins so, even where the same bytes are a valid header.
_COMPRESSED = re.compile(
    rb"\x1f\x8b|BZh.1AY&SY|\x5d\x00\x00\x80|\xfd7zXZ|\x28\xb5\x2f\xfd", re.DOTALL
)
_NO_TAR = "is not a tar archive (a compressed one must be unpacked first)"
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_RECORD = re.compile(rb"([0-9]{1,8}) ([^=\n\0]+)=")


@dataclass(frozen=True, slots=True)
class Member:
    """A member that is not a folder.

    name: whole, without slashes at its end; bytes that are not UTF-8 are lone surrogates.
    start, size: where its bytes are. regular: not a link, device or type that nobody knows.
    """

    name: str
    start: int
    size: int
    regular: bool = True


@dataclass(slots=True)
class _Header:
    """One block of 512 bytes that describes what follows it."""

    name: str
    size: int
    kind: bytes
    extended: bool


@dataclass(slots=True)
class _Extension:
    """What extension headers say of the next member."""

    names: dict[str, None] = field(default_factory=dict)
    sizes: dict[int, None] = field(default_factory=dict)
    problem: str | None = None

    def refuse(self, problem: str) -> None:
        self.problem = self.problem or problem


def read_members(stream: BinaryIO, size: int) -> Iterator[Member | LatentsError]:
    """The members in order, and an error for each part or member that cannot be read.

    Args:
        stream: seekable, of `size` bytes.
    """
    return _Walk(stream, size).members()


def printable(name: str) -> str:
    """A member's name as it may stand in a report: no control characters, not endless."""
    shown = "".join(c if c.isprintable() else "?" for c in name[:500])
    return shown if len(name) <= 500 else f"{shown}..."


class _Walk:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self._position = 0
        self._cut = False
        # Blocks that are neither headers nor data may still be walked, in bytes.
        self._gaps = MAX_SHARD_GAPS
        self._extension: _Extension | None = None

    def members(self) -> Iterator[Member | LatentsError]:
        if _COMPRESSED.match(self._read(0, min(BLOCK, self._size))):
            yield LatentsError(_NO_TAR)
            return
        ended = False
        while self._position + BLOCK <= self._size:
            if self._gaps <= 0:
                yield LatentsError(
                    f"has over {MAX_SHARD_GAPS // MIB} MiB of empty or damaged blocks: what "
                    f"follows byte {self._position} is not read"
                )
                return
            block = self._read(self._position, BLOCK)
            header = None if block == _EMPTY else _parse(block)
            ended = header is None
            if header is None:
                yield from self._unnamed()
                if block == _EMPTY:
                    # An empty block ends an archive, but nothing may hide behind it.
                    self._skip_empty()
                else:
                    yield self._skip_damaged()
                continue
            item = self._take(header)
            if item is not None:
                yield item
        yield from self._unnamed()
        if not ended and not self._cut:
            yield LatentsError(
                "is truncated: the archive has no end mark, so members may be missing"
            )

    def _unnamed(self) -> Iterator[LatentsError]:
        if self._extension is not None:
            self._extension = None
            yield LatentsError("has an extension header without a member after it")

    # -- headers -----------------------------------------------------------------------------

    def _take(self, header: _Header) -> Member | LatentsError | None:
        """What a header stands for, if anything; moves behind its data."""
        start = self._position + BLOCK
        if header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _SOLARIS_PAX, _GLOBAL_PAX):
            return self._extend(header, start)
        extension, self._extension = self._extension or _Extension(), None
        if len(extension.names) > 1:
            extension.refuse("is given several names by its extension headers")
        if len(extension.sizes) > 1:
            extension.refuse("is given several sizes by its extension headers")
        name = next(iter(extension.names), header.name).rstrip("/")
        size = next(iter(extension.sizes), header.size)
        if header.kind == _SPARSE:
            extension.refuse("is a sparse member, which is not read")
            start = self._behind_sparse_map(header, start)
        what = _WITHOUT_DATA.get(header.kind)
        if what is not None and size:
            # Readers differ in whether that many bytes are skipped.
            extension.refuse(f"is {what}, but its header states {size} bytes")
        held = 0 if what is not None else size
        self._position = start + _padded(held)
        if start + held > self._size:
            return self._truncated(name, held, start)
        if extension.problem is not None:
            return LatentsError(f"{printable(name)} {extension.problem}")
        if header.kind == _FOLDER:
            return None
        return Member(name, start, held, header.kind in _FILES)

    def _extend(self, header: _Header, start: int) -> LatentsError | None:
        """Keep what an extension header says for the member behind it."""
        padded = _padded(header.size)
        self._position = start + padded
        if self._position > self._size:
            return self._truncated(header.name, header.size, start)
        if header.kind == _GLOBAL_PAX:
            said = _Extension()
            self._read_pax(start, header.size, said)
            if said.names or said.sizes:
                said.refuse("gives a name or size to all members after it")
            if said.problem is not None:
                return LatentsError(f"has a global header that {said.problem}")
            return None
        self._extension = self._extension or _Extension()
        if header.kind == _LONG_NAME:
            self._read_long_name(start, header.size, self._extension)
        elif header.kind != _LONG_LINK:
            self._read_pax(start, header.size, self._extension)
        return None

    def _extension_body(self, start: int, size: int, extension: _Extension) -> bytes:
        """The bytes of an extension header; empty where it is refused."""
        if size > MAX_METADATA:
            extension.refuse(f"has an extension header of {size} bytes, limit {MAX_METADATA}")
            return b""
        data = self._read(start, _padded(size))
        if data[size:].strip(b"\0"):
            # tarfile reads whole blocks, and would go on in there.
            extension.refuse("has an extension header with more data after its end")
        return data[:size]

    def _read_long_name(self, start: int, size: int, extension: _Extension) -> None:
        name, _, rest = self._extension_body(start, size, extension).partition(b"\0")
        text = _text(name).rstrip("/")
        if rest.strip(b"\0") or not text:
            extension.refuse("has a damaged extension header")
        extension.names[text] = None

    def _read_pax(self, start: int, size: int, extension: _Extension) -> None:
        data = self._extension_body(start, size, extension)
        position = 0
        while position < len(data):
            record = _RECORD.match(data, position)
            end = position + int(record[1]) if record else 0
            if record is None or end <= record.end() or data[end - 1 : end] != b"\n":
                extension.refuse("has a damaged extension header")
                return
            _apply(record[2], data[record.end() : end - 1], extension)
            position = end

    def _behind_sparse_map(self, header: _Header, start: int) -> int:
        """Where the data of a sparse member of GNU's old format begins."""
        more = header.extended
        while more and start + BLOCK <= self._size:
            more = self._read(start, BLOCK)[504] != 0
            start += BLOCK
        return start

    def _truncated(self, name: str, size: int, start: int) -> LatentsError:
        self._position, self._cut, self._extension = self._size, True, None
        there = max(0, self._size - start)
        return LatentsError(f"is truncated: {printable(name)} has {size} bytes, {there} are there")

    # -- gaps --------------------------------------------------------------------------------

    def _skip_empty(self) -> None:
        """Move to the next block that is not empty, or as far as the bound on gaps reaches."""
        begun = self._position
        while self._position < self._size and self._position - begun < self._gaps:
            chunk = self._read(self._position, min(MIB, self._size - self._position))
            if chunk != _EMPTY_MIB:
                empty = len(chunk) - len(chunk.lstrip(b"\0"))
                self._position += empty if empty == len(chunk) else empty // BLOCK * BLOCK
                if empty != len(chunk):
                    break
            else:
                self._position += MIB
        self._gaps -= self._position - begun

    def _skip_damaged(self) -> LatentsError:
        """Move to the next valid header; headers stand at multiples of 512 bytes."""
        begun = self._position
        found = False
        self._position += BLOCK
        while not found and self._position < self._size and self._position - begun < self._gaps:
            chunk = self._read(self._position, min(MIB, self._size - self._position))
            at = _first_header(chunk)
            found = at is not None
            self._position += len(chunk) if at is None else at
        lost = self._position - begun
        self._gaps -= lost
        if begun == 0 and not found:
            return LatentsError(_NO_TAR)
        return LatentsError(f"has a damaged part: {lost} bytes from byte {begun} on cannot be read")

    def _read(self, position: int, count: int) -> bytes:
        self._stream.seek(position)
        return read_exactly(self._stream, count)


def is_header(block: bytes) -> bool:
    """Whether a block of 512 bytes is the header of a member, by its checksum."""
    return len(block) == BLOCK and _parse(block) is not None


def _parse(block: bytes) -> _Header | None:
    """A header; None where its checksum or its size is wrong.

    The other numbers are not looked at: where tarfile takes one of them for damage, more is read
    here than there.
    """
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if checksum is None or size is None:
        return None
    rest = block[:148] + block[156:]
    unsigned = sum(rest) + 8 * ord(" ")
    # Some old writers summed signed characters.
    if checksum != unsigned and checksum != unsigned - 256 * sum(b > 127 for b in rest):
        return None
    name, kind = _string(block[:100]), block[156:157]
    if kind == b"\0" and name.endswith("/"):
        kind = _FOLDER  # how a folder looks in archives from before 1988
    prefix = _string(block[345:500])
    if prefix and kind not in (_LONG_NAME, _LONG_LINK, _SPARSE):
        name = f"{prefix}/{name}"
    return _Header(name, size, kind, kind == _SPARSE and block[482] != 0)


def _first_header(chunk: bytes) -> int | None:
    """Where the first header of the modern kinds stands in whole blocks; None where none does."""
    letters = chunk[257::BLOCK]
    at = letters.find(b"u")
    while at >= 0:
        block = chunk[at * BLOCK : (at + 1) * BLOCK]
        if len(block) == BLOCK and block[257:262] == b"ustar" and _parse(block) is not None:
            return at * BLOCK
        at = letters.find(b"u", at + 1)
    return None


def _apply(key: bytes, value: bytes, extension: _Extension) -> None:
    """One record of a pax header. Keys that neither name nor place a member do not matter here."""
    if key == b"path":
        name = _text(value).rstrip("/")
        if not name or "\0" in name:
            extension.refuse("is given an empty name, or one with a NUL, by its extension header")
        extension.names[name] = None
    elif key == b"size":
        if not value.isdigit() or len(value) > 18:
            extension.refuse("is given a size that is not a number by its extension header")
        else:
            extension.sizes[int(value)] = None
    elif key.startswith(b"GNU.sparse."):
        extension.refuse("is a sparse member, which is not read")


def _number(field_: bytes) -> int | None:
    """A number of a header, octal or (GNU) binary; None where it is neither, or below 0."""
    if field_[0] == 0x80:
        return int.from_bytes(field_[1:], "big")
    octal = _OCTAL.fullmatch(field_)
    return None if octal is None else int(octal[1] or b"0", 8)


def _string(field_: bytes) -> str:
    return _text(field_.partition(b"\0")[0])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
