"""Classes of images in files of latents: next to the file, in it, or in a sample's KEY.cls.

They are read separately from the latents, and only for measuring. A scan does not need them, and a
file with strange labels is scanned all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_METADATA
from latentguard.files.compressed import is_gzip, unpacked
from latentguard.files.safetensors_files import read_metadata
from latentguard.files.shards import LATENT_SUFFIXES
from latentguard.files.streams import open_regular, read_exactly, size_of
from latentguard.files.tar import Member, printable, read_members
from latentguard.files.torch_files import read_value

if TYPE_CHECKING:
    from latentguard.files.reading import Record

LABELS = ("label", "cls", "class", "class_id")
"""Keys of a KEY.json under which a label is looked for."""
NAMES = ("label_name", "class_name", "synset", "wnid")
"""Keys of a KEY.json under which the name of the label is looked for."""
_BESIDE = (".labels.txt", ".names.txt")
_MAX_TEXT = 64 * MAX_METADATA  # of a labels file: millions of lines


@dataclass(frozen=True)
class Label:
    """What is said of one image's class; None is not said.

    value: a number, or a name. name: what a number stands for.
    """

    value: int | str | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Label:
        """A number if it is one, or else a name."""
        text = text.strip()[:1000]
        return cls(int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text)

    @classmethod
    def of_metadata(cls, values: Mapping[str, Any]) -> Label:
        """What a KEY.json says under the usual keys; values of other kinds are not labels."""
        value = next((v for k in LABELS if _is_label(v := values.get(k))), None)
        name = next((v for k in NAMES if isinstance(v := values.get(k), str)), None)
        if value is None:
            return cls(None if name is None else name[:1000])
        found = cls.parse(value) if isinstance(value, str) else cls(value)
        return replace(found, name=None if name is None else name[:1000])

    def merged(self, other: Label) -> Label:
        """What either says, a number before a name. Raises LatentsError where they differ."""
        both = (self, other)
        numbers = {one.value for one in both if isinstance(one.value, int)}
        words = [one.value for one in both if isinstance(one.value, str)]
        if len(numbers) > 1 or len(set(words)) > 1:
            said = " and ".join(repr(one.value)[:60] for one in both)
            raise LatentsError(f"its .cls and its .json have different labels, {said}")
        name = next((text for text in (*words, self.name, other.name) if text is not None), None)
        return Label(next(iter(numbers)), name) if numbers else Label(name)


class FileLabels:
    """The labels of one file's images: a shard's by key, another file's by place.

    Raises LatentsError, without the file's name, where what is there cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_key: dict[str, Label] | None = None
        self._by_place: list[Label] | None = None
        suffix = path.suffix.lower()
        if suffix == ".tar":
            self._by_key = dict(_of_shard(path))
        else:
            self._by_place = _within(path, suffix) or _beside(path)

    @property
    def count(self) -> int | None:
        """Of how many images something is said; None where that is nothing, or in a shard."""
        return None if self._by_place is None else len(self._by_place)

    def of(self, record: Record) -> Label:
        """The label of an image of this file."""
        if self._by_key is not None:
            name = record.source.removeprefix(f"{self._path}::")
            ending = next((s for s in LATENT_SUFFIXES if name.lower().endswith(s)), "")
            return self._by_key.get(name[: len(name) - len(ending)], Label())
        if self._by_place is None or record.index >= len(self._by_place):
            return Label()
        return self._by_place[record.index]


def _is_label(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


# -- shards ----------------------------------------------------------------------------------


def _of_shard(path: Path) -> Iterator[tuple[str, Label]]:
    """Key and label of each sample that has a KEY.cls or a KEY.json."""
    found: dict[str, Label] = {}
    with open_regular(path) as stream:
        for member in read_members(stream, size_of(stream)):
            if isinstance(member, LatentsError):
                continue  # an error of the latents' own reader
            base = member.name.rpartition("/")[2]
            stem, _, ending = member.name.rpartition(".")
            if ending.lower() not in ("cls", "json") or base.startswith("._"):
                continue
            key = printable(stem)
            try:
                label = _of_member(stream, member, ending.lower())
                found[key] = found[key].merged(label) if key in found else label
            except LatentsError as error:
                raise LatentsError(f"{printable(member.name)}: {error}") from error
    yield from found.items()


def _of_member(stream: BinaryIO, member: Member, ending: str) -> Label:
    if not member.regular or member.size > MAX_METADATA:
        raise LatentsError(f"is not a file of at most {MAX_METADATA} bytes")
    stream.seek(member.start)
    data = read_exactly(stream, member.size)
    try:
        if ending == "cls":
            return Label.parse(data.decode("utf-8"))
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LatentsError("is not UTF-8" if ending == "cls" else "is not JSON") from error
    return Label.of_metadata(values) if isinstance(values, dict) else Label()


# -- files of several images -----------------------------------------------------------------


def _within(path: Path, suffix: str) -> list[Label] | None:
    """What `latentguard encode` writes into a file; of a .npy into NAME.json."""
    values: Any = None
    if suffix in (".safetensors", ".latent"):
        with open_regular(path) as stream:
            metadata = read_metadata(stream, size_of(stream))
        values = {key: _json(metadata[key]) for key in _LISTS if key in metadata}
    elif suffix in (".pt", ".pth"):
        with open_regular(path) as stream:
            size = size_of(stream)
            held, size = unpacked(stream, size) if is_gzip(stream) else (stream, size)
            values = read_value(held, size)
    elif suffix == ".npy" and path.with_suffix(".json").is_file():
        values = _json(_text(path.with_suffix(".json")))
    return _listed(values) if isinstance(values, Mapping) else None


_LISTS = ("labels", "label_names")


def _listed(values: Mapping[Any, Any]) -> list[Label] | None:
    columns = [values.get(key) for key in _LISTS]
    lists = [column for column in columns if isinstance(column, list | tuple)]
    if not lists or any(column is not None and column not in lists for column in columns):
        return None
    if len({len(column) for column in lists}) > 1:
        raise LatentsError("has a different number of labels than of label_names")
    labels, names = ([] if column is None else column for column in columns)
    return [_label(value, name) for value, name in zip_longest(labels, names)]


def _label(value: Any, name: Any) -> Label:
    if not (value is None or _is_label(value)) or not (name is None or isinstance(name, str)):
        raise LatentsError(f"has a label that is neither number nor name: {value!r:.60}")
    return Label(value, name)


def _beside(path: Path) -> list[Label] | None:
    """NAME.labels.txt and NAME.names.txt, as `latentguard encode` writes them beside a file."""
    labels, names = (path.with_suffix(suffix) for suffix in _BESIDE)
    if not labels.is_file():
        return None
    found = [Label.parse(line) for line in _text(labels).splitlines()]
    named: Sequence[str] = _text(names).splitlines() if names.is_file() else ()
    return [
        Label(one.value, named[one.value])
        if isinstance(one.value, int) and one.value < len(named)
        else one
        for one in found
    ]


def _text(path: Path) -> str:
    with open_regular(path) as stream:
        data = stream.read(_MAX_TEXT + 1)
    if len(data) > _MAX_TEXT:
        raise LatentsError(f"{path.name} has over {_MAX_TEXT} bytes, which is the limit")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LatentsError(f"{path.name} is not UTF-8") from error


def _json(text: str) -> Any:
    """None where it is none: other people's files have other things under these names."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
