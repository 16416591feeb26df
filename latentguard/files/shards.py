"""WebDataset shards: .tar files of KEY.latent.pt (.npy, .safetensors, .npz) and KEY.json.

The archive is walked header by header and nothing is extracted; members that are neither are
skipped unread. Python's tarfile ends silently at the first damaged header, and a guard must not:
here the walk resumes at the next valid one, and what was lost is a record with an error.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_METADATA
from latentguard.files.claims import Claims
from latentguard.files.streams import Window, read_exactly

BLOCK = 512
LATENT_SUFFIXES = (".latent.pt", ".latent.pth", ".latent.safetensors", ".latent.npy", ".latent.npz")
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


@dataclass(frozen=True)
class Member:
    """A regular file of the archive: its name and where its bytes are."""

    name: str
    start: int
    size: int


@dataclass
class Sample:
    """What one key holds: latents, and what KEY.json says of them."""

    key: str
    latents: list[Member] = field(default_factory=list)
    metadata: Member | None = None


def read_samples(stream: BinaryIO, size: int) -> Iterator[Sample | LatentsError]:
    """The shard's samples in order, and an error for each part that cannot be read.

    As WebDataset has it, the members of a key are neighbours.
    """
    current: Sample | None = None
    found = False
    for member in _members(stream, size):
        if isinstance(member, LatentsError):
            if current is not None and current.latents:
                yield current
            current, found = None, True
            yield member
            continue
        suffix = next((s for s in LATENT_SUFFIXES if member.name.lower().endswith(s)), None)
        is_metadata = member.name.lower().endswith(".json")
        if suffix is None and not is_metadata:
            continue
        key = member.name[: -len(suffix or ".json")]
        if current is None or current.key != key:
            if current is not None and current.latents:
                yield current
            current = Sample(key)
        if suffix is None:
            current.metadata = member
        else:
            found = True
            current.latents.append(member)
    if current is not None and current.latents:
        yield current
    if not found:
        yield LatentsError(
            "holds no KEY.latent.pt, .latent.safetensors, .latent.npy or .latent.npz"
        )


def sample_claims(stream: BinaryIO, sample: Sample) -> Claims:
    """What KEY.json says; `id` is a name for the only image, else the key is."""
    if sample.metadata is None:
        return Claims()
    if sample.metadata.size > MAX_METADATA:
        raise LatentsError(
            f"{sample.metadata.name} has {sample.metadata.size} bytes, over the limit of "
            f"{MAX_METADATA}"
        )
    stream.seek(sample.metadata.start)
    try:
        values = json.loads(read_exactly(stream, sample.metadata.size))
    except (ValueError, RecursionError) as error:
        raise LatentsError(f"{sample.metadata.name} is not JSON") from error
    if not isinstance(values, dict):
        raise LatentsError(f"{sample.metadata.name} must be a JSON object")
    if "id" in values and "ids" not in values:
        values["ids"] = [values["id"]]
    return Claims.parse(values)


def member_window(stream: BinaryIO, member: Member) -> BinaryIO:
    """The member's bytes as a stream of their own."""
    return Window(stream, member.start, member.size)  # type: ignore[return-value]


def _members(stream: BinaryIO, size: int) -> Iterator[Member | LatentsError]:
    position, long_name, ended = 0, None, False
    while position + BLOCK <= size:
        stream.seek(position)
        try:
            block = read_exactly(stream, BLOCK)
            if not block.strip(b"\0"):
                # Two empty blocks end an archive, but nothing may hide behind them.
                ended, position = True, position + BLOCK
                continue
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError:
            after = _next_header(stream, position + BLOCK, size)
            lost = f"{(size if after is None else after) - position} bytes from byte {position}"
            if position == 0 and after is None:
                yield LatentsError("is not a tar archive (a compressed one must be unpacked first)")
            else:
                yield LatentsError(f"has a damaged part: {lost} on cannot be read")
            ended, position, long_name = True, size if after is None else after, None
            continue
        ended = False
        start = position + BLOCK
        held = 0 if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE) else info.size
        if held < 0 or start + held > size:
            yield LatentsError(
                f"is truncated: {_printable(info.name)} has {held} bytes, {size - start} are there"
            )
            return
        position = start + -(-held // BLOCK) * BLOCK
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            try:
                long_name = _extension_name(stream, start, info)
            except LatentsError as error:
                yield error
            continue
        if info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            continue
        name, long_name = _printable(long_name or info.name), None
        if info.type in _FILES:
            yield Member(name, start, held)
        elif name.lower().endswith(LATENT_SUFFIXES):
            yield LatentsError(f"{name} is not a regular file (a link, or sparse)")
    if not ended:
        yield LatentsError("is truncated: the archive has no end mark, so members may be missing")


def _next_header(stream: BinaryIO, position: int, size: int) -> int | None:
    """Where the next valid header is: headers stand at multiples of 512 bytes."""
    while position + BLOCK <= size:
        stream.seek(position)
        block = read_exactly(stream, BLOCK)
        if block[257:262] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            except tarfile.HeaderError:
                pass
            else:
                return position
        position += BLOCK
    return None


def _extension_name(stream: BinaryIO, start: int, info: tarfile.TarInfo) -> str | None:
    """The name that a GNU or pax extension header gives to the next member."""
    if info.size > MAX_METADATA:
        raise LatentsError(
            f"has an extension header of {info.size} bytes, over the limit of {MAX_METADATA}"
        )
    stream.seek(start)
    data = read_exactly(stream, info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "replace")
    name = None
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 8 or not 0 < int(length) <= len(data):
            raise LatentsError("has a damaged extension header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"size" or key.startswith(b"GNU.sparse"):
            raise LatentsError("has a member of over 8 GiB or a sparse one, which are not read")
        if key == b"path":
            name = value.decode("utf-8", "replace")
        data = data[int(length) :]
    return name


def _printable(name: str) -> str:
    """A member's name as it may stand in a report: no control characters, not endless."""
    return "".join(c if c.isprintable() else "?" for c in name)[:500]
