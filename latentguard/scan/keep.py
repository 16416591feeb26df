"""Filtered copies of WebDataset shards: the samples of one decision, each with all of its members.

A sample has the strictest decision of its images. One with a member that could hold latents and
was not judged counts as blocked, so that a copy of what is allowed holds nothing else.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

from latentguard.errors import LatentsError, UsageError
from latentguard.files.passed_over import could_hold_latents
from latentguard.files.shards import member_head, member_window
from latentguard.files.streams import open_regular, size_of
from latentguard.files.tar import Member, printable, read_members
from latentguard.judge import DECISIONS
from latentguard.scan.options import Keep
from latentguard.scan.record import ScanRecord
from latentguard.scan.schema import sample_key, split_source
from latentguard.scan.shard import Shard


def check_keep(shards: list[Shard]) -> None:
    """Raises UsageError if something that is to be scanned is not a WebDataset shard."""
    for shard in shards:
        for name in shard.files:
            if shard.error is None and not name.partition("?")[0].lower().endswith(".tar"):
                raise UsageError(
                    f"--keep copies samples of WebDataset shards (.tar), but {name} is not one: "
                    "scan it without --keep"
                )


class Decisions:
    """The strictest decision on each member of a shard."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}

    def add(self, record: ScanRecord) -> None:
        _, member = split_source(record.source)
        if member is not None:
            known = self._of.get(member, "allow")
            self._of[member] = max(known, record.verdict.decision, key=DECISIONS.index)

    @property
    def members(self) -> Mapping[str, str]:
        """Member, as records name it -> decision."""
        return self._of


def copy_kept(
    shard: Path, decisions: Mapping[str, str], keep: Keep, out: BinaryIO, chosen: bool
) -> int:
    """Write the samples of a shard with the decision `keep`, in its order; how many those are.

    Args:
        decisions: of the members that were judged, as `Decisions` has them.
        chosen: whether the operator said which members hold the latents, so that no others count.

    Raises:
        LatentsError: the shard cannot be read.
    """
    count = 0
    with open_regular(shard) as stream, tarfile.open(fileobj=out, mode="w") as copy:
        for sample in _samples(stream):
            if _decision(stream, sample, decisions, chosen) != keep:
                continue
            if not all(member.regular for member in sample):
                continue  # a link has no bytes of its own that could be copied
            count += 1
            for member in sample:
                header = tarfile.TarInfo(member.name)
                header.size = member.size
                copy.addfile(header, member_window(stream, member))
    return count


def _samples(stream: BinaryIO) -> Iterator[list[Member]]:
    """Neighbors of one key, as WebDataset groups them; what has no key is in no sample.

    Samples on both sides of a damaged part may lack members, and are left out.
    """
    sample: list[Member] = []
    current: str | None = None
    whole = True
    for member in read_members(stream, size_of(stream)):
        if isinstance(member, LatentsError):
            sample, current, whole = [], None, False
            continue
        key = _key(member)
        if key is None:
            continue
        if key != current:
            if sample and whole:
                yield sample
            whole = whole or bool(sample)
            sample, current = [], key
        sample.append(member)
    if sample and whole:
        yield sample


def _key(member: Member) -> str | None:
    key = sample_key(f"::{member.name}", None)
    return None if key == member.name else key


def _decision(
    stream: BinaryIO, sample: list[Member], decisions: Mapping[str, str], chosen: bool
) -> str | None:
    """The strictest of a sample's members; None where none of them was judged."""
    found: list[str] = []
    for member in sample:
        decision = decisions.get(printable(member.name))
        if decision is not None:
            found.append(decision)
        elif not chosen and could_hold_latents(member.name, partial(member_head, stream, member)):
            found.append("block")
    return max(found, key=DECISIONS.index) if found else None
