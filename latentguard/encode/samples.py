"""One picture of a source, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MAX_ID = 1000


def plain_id(text: str) -> str:
    """A name as a latents file may have it: no control characters, and the end of a long one."""
    return "".join(c if c.isprintable() else "?" for c in text)[-_MAX_ID:]


@dataclass(frozen=True)
class Sample:
    """A picture that is to be encoded.

    Attributes:
        id: its name: the path below the folder that was given, a shard's key, a row's key or path.
        source: where it is, for messages.
        read: its bytes. Raises LatentsError.
        caption: text that belongs to it.
        label: its class, a number or a name. label_name: what the number stands for.
        source_metadata: what a shard's KEY.json says of it.
        anywhere: whether `read` may be called from any thread; else by who walks the source,
            before its next sample is asked for.
    """

    id: str
    source: str
    read: Callable[[], bytes] = field(repr=False)
    caption: str | None = None
    label: int | str | None = None
    label_name: str | None = None
    source_metadata: dict[str, Any] | None = None
    anywhere: bool = False


@dataclass(frozen=True)
class Problem:
    """A picture, or a part of a source, that could not be encoded, and why: one sentence."""

    source: str
    error: str
    id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Of JSON's kinds."""
        return {"source": self.source, "id": self.id, "error": self.error}
