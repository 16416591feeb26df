"""WebDataset shards: .tar files of KEY.latent.pt (.npy, .safetensors, .npz) and KEY.json.

Members of another ending are read where the operator names it (`Reading.member`).

The archive is walked header by header (tar.py) and nothing is extracted. Members of other names
are not read: those that could hold latents make an error, the others are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_METADATA, MAX_SHARD_SAMPLE
from latentguard.files.claims import Claims
from latentguard.files.options import NOTHING_SAID, Reading
from latentguard.files.passed_over import HEAD, PassedOver, could_hold_latents, is_apple_double
from latentguard.files.streams import Window, read_exactly
from latentguard.files.tar import Member, printable, read_members

LATENT_SUFFIXES = (".latent.pt", ".latent.pth", ".latent.safetensors", ".latent.npy", ".latent.npz")
# img2dataset says the size of the picture that it downloaded, and of what it made of it.
_IMG2DATASET = {"original_height", "original_width"}
_SHOWN = 3


@dataclass
class Sample:
    """What one key holds: latents, and what KEY.json says of them.

    metadata: KEY.json, twice where there are several.
    """

    key: str
    latents: list[Member] = field(default_factory=list)
    metadata: list[Member] = field(default_factory=list)


@dataclass
class _Members:
    """Members that are not read: how many, and the first few names."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < _SHOWN:
            self.names.append(printable(name)[:100])

    def said(self, what: str) -> str:
        """The subject and verb of a sentence: "2 members are", "1 member that ... is"."""
        members, are = ("member", "is") if self.count == 1 else ("members", "are")
        return f"{self.count} {members}{what} {are}"

    @property
    def shown(self) -> str:
        more = ", ..." if self.count > len(self.names) else ""
        return f"({', '.join(self.names)}{more})"


def _unread(members: _Members) -> LatentsError:
    """Of members that could hold latents, and are named otherwise than those that are read."""
    return LatentsError(
        f"{members.said(' that could hold latents')} not read {members.shown}: name latents in a "
        "shard KEY.latent.pt, .latent.safetensors, .latent.npy or .latent.npz, or say how they are "
        f"named (--member {_ending(members.names[0])})"
    )


def _passed_over(members: _Members) -> LatentsError:
    """Of members that cannot hold latents, where none may be passed over."""
    return LatentsError(
        f"{members.said('')} not latents {members.shown}, and with --strict no member is passed "
        "over"
    )


def _ending(name: str) -> str:
    """What follows the key of a sample in a member's name, as WebDataset has it."""
    base = name.rpartition("/")[2].lstrip(".")
    return base.partition(".")[2] or base


def read_samples(
    stream: BinaryIO, size: int, passed: PassedOver, reading: Reading = NOTHING_SAID
) -> Iterator[Sample | LatentsError]:
    """The shard's samples in order, and an error for each part that cannot be read.

    As WebDataset has it, the members of a key are neighbors.

    Args:
        passed: counts the members that cannot hold latents.
    """
    current = Sample("")
    found = False
    unread, aside = _Members(), _Members()
    endings = LATENT_SUFFIXES if reading.member is None else (f".{reading.member}",)

    def passes(name: str) -> None:
        passed.add_member(name)
        aside.add(name)

    for member in read_members(stream, size):
        if isinstance(member, LatentsError):
            yield from _complete(current)
            current, found = Sample(""), True
            yield member
            continue
        name = member.name.lower()
        head = partial(member_head, stream, member)
        if is_apple_double(name, head):
            passes(name)
            continue
        suffix = next((s for s in endings if name.endswith(s)), None)
        if suffix is None and could_hold_latents(name, head):
            if reading.member is None:
                unread.add(member.name)
            else:
                passed.left_members += 1
            continue
        if suffix is None and not name.endswith(".json"):
            passes(name)
            continue
        key = member.name[: -len(suffix or ".json")]
        if current.key != key:
            yield from _complete(current)
            current = Sample(key)
        if suffix is None:
            if member.regular:
                current.metadata = [*current.metadata[:1], member]
            continue
        found = True
        if not member.regular:
            yield LatentsError(
                f"{printable(member.name)} is not a regular file (a link, or sparse)"
            )
        elif len(current.latents) == MAX_SHARD_SAMPLE:
            yield LatentsError(
                f"{printable(member.name)} is not read: its key has over {MAX_SHARD_SAMPLE} latents"
            )
        else:
            current.latents.append(member)
    yield from _complete(current)
    if unread.count:
        yield _unread(unread)
    elif not found:
        yield LatentsError(
            "holds no KEY.latent.pt, .latent.safetensors, .latent.npy or .latent.npz"
            if reading.member is None
            else f"holds no KEY.{reading.member}, as --member says"
        )
    if reading.strict and aside.count:
        yield _passed_over(aside)


def sample_claims(stream: BinaryIO, sample: Sample, reading: Reading = NOTHING_SAID) -> Claims:
    """What KEY.json says; `id` is a name for the only image, else the key is.

    Height and width of img2dataset are in pixels.
    """
    if not sample.metadata:
        return Claims()
    metadata = sample.metadata[0]
    shown = printable(metadata.name)
    if len(sample.metadata) > 1:
        raise LatentsError(f"{shown} occurs more than once, so it is unknown which one counts")
    if metadata.size > MAX_METADATA:
        raise LatentsError(f"{shown} has {metadata.size} bytes, over the limit of {MAX_METADATA}")
    stream.seek(metadata.start)
    try:
        values = json.loads(read_exactly(stream, metadata.size))
    except (ValueError, RecursionError) as error:
        raise LatentsError(f"{shown} is not JSON") from error
    if not isinstance(values, dict):
        raise LatentsError(f"{shown} must be a JSON object")
    if "id" in values and "ids" not in values:
        values["ids"] = [values["id"]]
    return Claims.parse(values, pixels=reading.pixels or values.keys() >= _IMG2DATASET)


def member_window(stream: BinaryIO, member: Member) -> BinaryIO:
    """The member's bytes as a stream of their own."""
    return Window(stream, member.start, member.size)  # type: ignore[return-value]


def _complete(sample: Sample) -> Iterator[Sample]:
    if sample.latents:
        yield sample


def member_head(stream: BinaryIO, member: Member) -> bytes:
    """The first bytes of a member, by which `could_hold_latents` goes."""
    stream.seek(member.start)
    return read_exactly(stream, min(HEAD, member.size))
