"""Tables of latents with one sample per row: which column holds the latents, and what a row is.

Parquet (parquet.py) and MosaicML's MDS (mds.py) describe their columns, and give the rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from latentguard.errors import LatentsError
from latentguard.files.beside import is_shape_of_latents, is_text_name
from latentguard.files.claims import Claims, Payload
from latentguard.files.explain import no_latents
from latentguard.files.options import Reading
from latentguard.files.passed_over import PassedOver, is_harmless

IDS = ("__key__", "key", "id")
"""Columns that name the rows; the first one counts."""
CLAIMS = ("space", "scaled", "layout", "height", "width")
"""Columns that say something about the latents of their row."""

_LATENTS = re.compile(r"(latents?|moments|latent_image)(\.(npy|npz|pt|pth|safetensors))?")
_PICTURES = {"image", "images", "picture", "thumbnail", "photo", "mask", "video", "audio", "text"}
_SHOWN = 3


@dataclass(frozen=True)
class Column:
    """A column as far as its type tells.

    readable: whether its values can be latents (`values.py`). opaque: whether they can be
    something that is not read, such as pickles. shape: of each value, where the type says it; empty
    for a flat list of numbers, None for bytes and where it varies.
    """

    name: str
    readable: bool
    opaque: bool = False
    shape: tuple[int, ...] | None = None

    @property
    def could_hold(self) -> bool:
        """Whether it could hold latents, which makes an error of it where it is not read."""
        if self.opaque:
            return True
        if not self.readable or self.harmless:
            return False
        if self.shape is None:
            return True
        # A flat list is a list of features, unless it is called latents.
        flat = not self.shape
        return "latent" in self.name.lower() if flat else is_shape_of_latents(self.shape)

    @property
    def harmless(self) -> bool:
        """Whether its name is that of pictures, text or embeddings of text."""
        name = self.name.lower()
        return name in _PICTURES or is_harmless(f".{name}") or is_text_name(name)


@dataclass(frozen=True)
class Row:
    """A row's latents, to be opened when its turn comes.

    place: where it is, as in "row 7". key: its name.
    """

    place: str
    key: str | None
    claims: Claims
    open: Callable[[Claims], Payload]


@dataclass(frozen=True)
class Table:
    """The columns that are read. unread: names of others that could hold latents."""

    latents: str
    id: str | None
    claims: tuple[str, ...]
    unread: tuple[str, ...] = ()

    def check(self) -> None:
        """LatentsError where a column that is not read could hold latents."""
        if self.unread:
            shown = ", ".join(name[:30] for name in self.unread[:_SHOWN])
            more = ", ..." if len(self.unread) > _SHOWN else ""
            raise LatentsError(
                f"holds columns besides {self.latents[:30]} that could be latents but were not "
                f"looked at ({shown}{more}): name the one that counts (--key), and scan once for "
                "each one"
            )


def choose_columns(columns: Iterable[Column], reading: Reading, passed: PassedOver) -> Table:
    """The columns of a table that are read.

    passed: counts the columns that the operator skips.

    Raises LatentsError where it is not said which one holds the latents.
    """
    found = {column.name: column for column in columns}
    readable = [column.name for column in found.values() if column.readable]
    if reading.key is not None:
        if reading.key not in readable:
            raise no_latents(
                found, (), f"a column {reading.key[:60]!r} of bytes or numbers", said=True
            )
        name = reading.key
    else:
        usual = [name for name in readable if _LATENTS.fullmatch(name)]
        candidates = usual or [name for name in readable if found[name].could_hold]
        if len(candidates) != 1:
            raise no_latents(found, candidates, "one column of latents, called latents")
        name = candidates[0]
    others = tuple(one.name for one in found.values() if one.name != name and one.could_hold)
    if reading.key is not None:
        passed.left += len(others)
        others = ()
    identity = next((one for one in IDS if one in found and one != name), None)
    return Table(name, identity, tuple(one for one in CLAIMS if one in found), others)
