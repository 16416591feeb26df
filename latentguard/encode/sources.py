"""From paths to units of work: a group of picture files, a shard or a table."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from latentguard.encode.folders import BESIDE, CONTAINERS, PassedOver, walk
from latentguard.encode.pictures import SUFFIXES, read_picture
from latentguard.encode.samples import Problem, Sample, plain_id
from latentguard.encode.tables import (
    Columns,
    arrow_samples,
    count_rows,
    dataset_files,
    parquet_samples,
)
from latentguard.encode.tars import count_pictures, tar_samples
from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_METADATA
from latentguard.files.streams import open_regular

Labels = Literal["beside", "folder", "none"]
"""Where labels come from: what shards and tables say, the folder that a picture is in, nowhere."""


@dataclass(frozen=True)
class Unit:
    """Pictures that are walked in one go.

    name: what tells it from others, for `Sources.sha256`. count: how many pictures it has, None
    where that is not known without reading it. walk: its samples, which may raise LatentsError.
    """

    name: str
    count: Callable[[], int | None]
    walk: Callable[[], Iterator[Sample | Problem]]

    def samples(self) -> Iterator[Sample | Problem]:
        """The pictures in order; what ends the unit early is the last one, as a Problem."""
        try:
            yield from self.walk()
        except LatentsError as error:
            yield Problem(self.name, str(error))


@dataclass(frozen=True)
class Sources:
    """All that the paths hold, in a stable order.

    classes: names of the folders that are labels, whose numbers are their places.
    passed: what folders and shards hold besides; those of shards once they were walked.
    """

    units: tuple[Unit, ...]
    passed: PassedOver
    classes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the names of all units, which tells a run's pictures from others."""
        text = "\0".join(unit.name for unit in self.units)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def find_sources(
    paths: Sequence[str | Path],
    labels: Labels = "beside",
    columns: Columns | None = None,
    group: int = 1000,
) -> Sources:
    """What is below the paths: pictures, WebDataset shards, Parquet files, datasets on disk.

    Args:
        labels: `folder` takes the first folder below the path that was given (ImageFolder).
        columns: of tables.
        group: picture files that are one unit, at most.

    Raises:
        LatentsError: a path that is not there, a file of no known kind, no pictures at all, or
            pictures outside of folders where these are the labels.
    """
    passed = PassedOver()
    found = [one for given in map(Path, paths) for one in _found(given, len(paths) > 1, passed)]
    if not found:
        raise LatentsError(
            f"no pictures ({', '.join(SUFFIXES)}), shards or tables ({', '.join(CONTAINERS)}) in "
            f"{', '.join(map(str, paths))}"
        )
    classes: dict[str, int] = {}
    if labels == "folder":
        names = {one.folder() for one in found if one.is_picture}
        classes = {name: number for number, name in enumerate(sorted(names))}
    units: list[Unit] = []
    loose: list[Sample | Problem] = []
    for one in found:
        if isinstance(one.item, Problem):
            loose.append(one.item)
        elif one.is_picture:
            loose.append(_loose(one.item, one, classes))
        else:
            units += _groups(loose, group)
            loose = []
            units.append(_container(one.item, passed, labels, columns or Columns()))
    units += _groups(loose, group)
    return Sources(tuple(units), passed, tuple(map(plain_id, classes)))


@dataclass(frozen=True)
class _Found:
    """A file below a path that was given, or why it is not found.

    below: its name within that path. prefix: what tells it from those of other paths.
    """

    item: Path | Problem
    below: str = ""
    prefix: str = ""

    @property
    def is_picture(self) -> bool:
        return isinstance(self.item, Path) and self.item.suffix.lower() in SUFFIXES

    def folder(self) -> str:
        """The first folder on its way. Raises LatentsError where there is none."""
        folder, slash, _ = self.below.partition("/")
        if not slash:
            raise LatentsError(
                f"{self.item} is not in a folder below the given path, but --labels folder takes "
                "the class from such a folder"
            )
        return folder


def _found(given: Path, several: bool, passed: PassedOver) -> Iterator[_Found]:
    for item in _expand(given, passed):
        if isinstance(item, Problem):
            yield _Found(item)
        else:
            below = item.relative_to(given).as_posix() if item != given else item.name
            yield _Found(item, below, f"{given.name}/" if several else "")


def _expand(given: Path, passed: PassedOver) -> Iterator[Path | Problem]:
    if not os.path.lexists(given):
        raise LatentsError(f"no such file or folder of pictures: {given}")
    if not given.is_dir():
        if given.suffix.lower() not in (*SUFFIXES, *CONTAINERS):
            raise LatentsError(
                f"{given} is of an unknown kind: give pictures ({', '.join(SUFFIXES)}), "
                f"shards or tables ({', '.join(CONTAINERS)}), or folders of them"
            )
        yield given
        return
    of_datasets: dict[Path, list[Path] | None] = {}
    for item in walk(given, passed):
        if isinstance(item, Path) and item.suffix.lower() == ".arrow":
            folder = item.parent
            try:
                if folder not in of_datasets:
                    of_datasets[folder] = dataset_files(folder)
                    yield from of_datasets[folder] or ()
            except LatentsError as error:
                of_datasets[folder] = []
                yield Problem(str(folder / "state.json"), str(error))
            if of_datasets[folder] is not None:
                if item not in (of_datasets[folder] or ()):
                    passed.add(item)
                continue
        yield item


def _groups(loose: list[Sample | Problem], size: int) -> list[Unit]:
    return [_group(tuple(loose[at : at + size])) for at in range(0, len(loose), size)]


def _group(samples: tuple[Sample | Problem, ...]) -> Unit:
    names = [item.id if isinstance(item, Sample) else item.source for item in samples]
    text = "\0".join(map(str, names)).encode("utf-8", "surrogatepass")
    name = f"{names[0]} and {len(names) - 1} more ({hashlib.sha256(text).hexdigest()})"

    def captioned() -> Iterator[Sample | Problem]:
        for item in samples:
            yield _with_caption(item) if isinstance(item, Sample) else item

    return Unit(name, lambda: len(samples), captioned)


def _loose(path: Path, found: _Found, classes: dict[str, int]) -> Sample:
    label = found.folder() if classes else None
    return Sample(
        id=plain_id(found.prefix + found.below),
        source=str(path),
        read=partial(read_picture, path),
        label=None if label is None else classes[label],
        label_name=None if label is None else plain_id(label),
        anywhere=True,
    )


def _with_caption(sample: Sample) -> Sample | Problem:
    """With what NAME.txt or NAME.caption beside a picture says."""
    for suffix in BESIDE:
        beside = Path(sample.source).with_suffix(suffix)
        if not beside.is_file():
            continue
        try:
            with open_regular(beside) as stream:
                data = stream.read(MAX_METADATA + 1)
            if len(data) > MAX_METADATA:
                raise LatentsError(f"has over {MAX_METADATA} bytes, which is the limit")
            return replace(sample, caption=data.decode("utf-8-sig").strip())
        except UnicodeDecodeError:
            return Problem(sample.source, f"its caption {beside.name} is not UTF-8", sample.id)
        except LatentsError as error:
            return Problem(sample.source, f"its caption {beside.name} {error}", sample.id)
    return sample


def _container(path: Path, passed: PassedOver, labels: Labels, columns: Columns) -> Unit:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return Unit(
            str(path),
            partial(_counted, count_pictures, path),
            lambda: _labeled(tar_samples(path, passed), labels),
        )
    if suffix == ".parquet":
        return Unit(
            str(path),
            partial(_counted, count_rows, path),
            lambda: _labeled(parquet_samples(path, columns), labels),
        )
    return Unit(str(path), lambda: None, lambda: _labeled(arrow_samples(path, columns), labels))


def _counted(count: Callable[[Path], int], path: Path) -> int | None:
    try:
        return count(path)
    except LatentsError:
        return None  # walking the unit says why


def _labeled(samples: Iterator[Sample | Problem], labels: Labels) -> Iterator[Sample | Problem]:
    for item in samples:
        if labels == "none" and isinstance(item, Sample):
            yield replace(item, label=None, label_name=None)
        else:
            yield item
