"""Pictures of WebDataset shards: KEY.jpg and the like, with KEY.txt, KEY.json and KEY.cls beside.

The archive is walked header by header (files/tar.py); nothing is extracted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from latentguard.encode.folders import PassedOver
from latentguard.encode.pictures import SUFFIXES, check_bytes
from latentguard.encode.samples import Problem, Sample, plain_id
from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_METADATA
from latentguard.files.labels import Label
from latentguard.files.streams import open_regular, read_exactly, size_of
from latentguard.files.tar import Member, printable, read_members

_CAPTIONS = ("txt", "caption")
_BESIDE = (*_CAPTIONS, "json", "cls")
# It is written again within a KEY.json of latents, three times as long where it is not ASCII.
_MAX_TEXT = MAX_METADATA // 4
CAPTION_KEYS = ("caption", "text", "prompt")
"""Keys of a KEY.json under which a caption is looked for, where there is no KEY.txt."""


@dataclass
class _Group:
    """The neighbors of one key."""

    key: str
    pictures: list[tuple[str, Member]] = field(default_factory=list)
    beside: dict[str, Member] = field(default_factory=dict)


def tar_samples(path: Path, passed: PassedOver) -> Iterator[Sample | Problem]:
    """The pictures of a shard in order. `read` of each is called before the next one is asked for.

    A key with several pictures gives one sample each, `KEY.ENDING`.
    """
    with open_regular(path) as stream:
        group = _Group("")
        for member in read_members(stream, size_of(stream)):
            if isinstance(member, LatentsError):
                yield from _samples(path, stream, group)
                group = _Group("")
                yield Problem(str(path), str(member))
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            suffix = ending.rpartition(".")[2].lower()
            apple = base.startswith("._")
            if apple or (f".{suffix}" not in SUFFIXES and ending.lower() not in _BESIDE):
                passed.add(Path(base))
                continue
            key = f"{folder}{slash}{stem}"
            if key != group.key:
                yield from _samples(path, stream, group)
                group = _Group(key)
            if f".{suffix}" in SUFFIXES:
                group.pictures.append((ending, member))
            else:
                group.beside[ending.lower()] = member
        yield from _samples(path, stream, group)


def count_pictures(path: Path) -> int:
    """How many pictures a shard has. Raises LatentsError where it cannot be opened."""
    with open_regular(path) as stream:
        names = (
            item.name.rpartition("/")[2].lower()
            for item in read_members(stream, size_of(stream))
            if isinstance(item, Member)
        )
        return sum(name.endswith(SUFFIXES) and not name.startswith("._") for name in names)


def _samples(path: Path, stream: BinaryIO, group: _Group) -> Iterator[Sample | Problem]:
    if not group.pictures:
        return
    try:
        metadata = _metadata(stream, group)
        caption, label = _caption(stream, group, metadata), _label(stream, group, metadata)
    except LatentsError as error:
        for ending, _ in group.pictures:
            yield Problem(
                f"{path}::{printable(group.key)}.{ending}", str(error), plain_id(group.key)
            )
        return
    for ending, member in group.pictures:
        name = printable(member.name)
        yield Sample(
            id=plain_id(group.key if len(group.pictures) == 1 else f"{group.key}.{ending}"),
            source=f"{path}::{name}",
            read=partial(_read, stream, member),
            caption=caption,
            label=label.value,
            label_name=None if label.name is None else plain_id(label.name),
            source_metadata=metadata,
        )


def _read(stream: BinaryIO, member: Member) -> bytes:
    if not member.regular:
        raise LatentsError("is not a regular file (a link, or sparse)")
    check_bytes(member.size)
    stream.seek(member.start)
    return read_exactly(stream, member.size)


def _text(stream: BinaryIO, group: _Group, ending: str) -> str:
    member = group.beside[ending]
    if member.size > _MAX_TEXT:
        raise LatentsError(f"its .{ending} has {member.size} bytes, over the limit of {_MAX_TEXT}")
    try:
        return _read(stream, member).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LatentsError(f"its .{ending} is not UTF-8") from error


def _metadata(stream: BinaryIO, group: _Group) -> dict[str, Any] | None:
    if "json" not in group.beside:
        return None
    try:
        values = json.loads(_text(stream, group, "json"))
        json.dumps(values)  # what is nested too deep to be written again
    except (ValueError, RecursionError) as error:
        if isinstance(error, LatentsError):
            raise
        raise LatentsError("its .json is not JSON") from error
    if not isinstance(values, dict):
        raise LatentsError("its .json is not a JSON object")
    return values


def _caption(stream: BinaryIO, group: _Group, metadata: dict[str, Any] | None) -> str | None:
    for ending in _CAPTIONS:
        if ending in group.beside:
            return _text(stream, group, ending).strip()
    found = ((metadata or {}).get(key) for key in CAPTION_KEYS)
    return next((text for text in found if isinstance(text, str)), None)


def _label(stream: BinaryIO, group: _Group, metadata: dict[str, Any] | None) -> Label:
    """What KEY.cls says, and KEY.json where that says nothing."""
    said = Label() if metadata is None else Label.of_metadata(metadata)
    if "cls" not in group.beside:
        return said
    return Label.parse(_text(stream, group, "cls")).merged(said)
