"""Which class each image is of: as files, shards, tables and folders say it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from latentguard.encode.samples import Problem
from latentguard.encode.sources import find_sources
from latentguard.errors import LatentsError, ModelError
from latentguard.evaluate.classes import SYNSET, Classes
from latentguard.evaluate.lines import read_lines, read_text
from latentguard.files import read_latents
from latentguard.files.labels import FileLabels, Label

if TYPE_CHECKING:
    from latentguard.files import Record


@dataclass(frozen=True)
class Told:
    """What is known of one image's class.

    where: of messages. id: the image's name. folder: the folder that it is in, by which it is
    classified where nothing else is said.
    """

    where: str
    label: Label
    id: str | None = None
    folder: str | None = None


def told_of_latents(
    paths: Sequence[str | Path],
    space: str | None = None,
    scaled: bool | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Told]:
    """What files of latents say of their images' classes, in the order in which these are read.

    Every image is read, so that whatever is wrong is said before anything is measured.
    Raises LatentsError for an image that cannot be read, and for labels that do not fit.
    """
    found: list[Told] = []
    for source, records in groupby(read_latents(paths, space, scaled), _file_of):
        path = Path(source)
        count, labels = len(found), None
        for record in records:
            if record.latents is None:
                raise LatentsError(f"{record.source}[{record.index}]: {record.error}")
            labels = labels or _file_labels(path)
            where = record.source if record.index == 0 else f"{record.source}[{record.index}]"
            folder = _folder(record.id) or path.absolute().parent.name
            found.append(Told(where, labels.of(record), record.id or path.stem, folder))
            progress(len(found))
        count = len(found) - count
        if labels is not None and labels.count not in (None, count):
            raise LatentsError(f"{path}: has {count} images, and labels of {labels.count}")
    return found


def _file_of(record: Record) -> str:
    return record.source.partition("::")[0]


def _file_labels(path: Path) -> FileLabels:
    try:
        return FileLabels(path)
    except LatentsError as error:
        raise LatentsError(f"{path}: {error}") from error


def told_of_pictures(paths: Sequence[str | Path]) -> list[Told]:
    """What shards, tables and folders say of the classes of pictures, of which none is decoded.

    Raises LatentsError for a part of them that cannot be read.
    """
    found = []
    for unit in find_sources(paths).units:
        for sample in unit.samples():
            if isinstance(sample, Problem):
                raise LatentsError(f"{sample.source}: {sample.error}")
            # Of a picture in a folder its own folder counts, of others that of their name.
            inside = _folder(sample.id)
            folder = Path(sample.source).absolute().parent.name if sample.anywhere else inside
            label = Label(sample.label, sample.label_name)
            found.append(Told(sample.source, label, sample.id, folder))
    return found


def told_of_file(path: Path, images: Callable[[], Sequence[Told]]) -> list[Told]:
    """A file that labels images: a number, a synset or a class name a line, in their order.

    A .csv is Kaggle's LOC_val_solution.csv: the name of each image, and its synset first in what
    was to be predicted. images: what is asked then for the images' names.

    Raises ModelError, which names file and line; and for an image that the .csv does not have.
    """
    if path.suffix.lower() == ".csv":
        solution = _solution(path)
        return [_solved(path, solution, one) for one in images()]
    return [
        Told(f"{path}, line {number}", Label.parse(line))
        for number, line in enumerate(read_lines(path), 1)
    ]


def resolve(images: Sequence[Told], classes: Classes, by_number: bool = False) -> list[int]:
    """The number of each image's class.

    What a label is called counts over its number, as numbers are of whatever made the labels;
    `by_number` takes them. Where the classes have no synsets and the images are of as many synsets
    as there are classes, both are in the order of the synsets, as everybody sorts ImageNet.

    Raises ModelError for the first image whose class is not known, or not certain.
    """
    synsets = classes.by_synset
    if not synsets:
        there = sorted({text for one in images if SYNSET.fullmatch(text := _text(one) or "")})
        if len(there) == len(classes):
            synsets = {synset: number for number, synset in enumerate(there)}
    return [_number(one, classes, synsets, by_number) for one in images]


def _number(one: Told, classes: Classes, synsets: Mapping[str, int], by_number: bool) -> int:
    number = one.label.value if isinstance(one.label.value, int) else None
    text = None if by_number else _text(one)
    if by_number and number is None:
        raise ModelError(f"{one.where}: brings no number as its label, and numbers are asked for")
    if text is None and number is None:
        raise ModelError(
            f"{one.where}: brings no label: neither a label of its own nor a folder that it is in"
        )
    if text is not None and SYNSET.fullmatch(text):
        return _of_synset(one, text, number, classes, synsets)
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 10):
        return _of_name(one, text, number, classes)
    found = number if text is None else int(text)
    if found is None or not 0 <= found < len(classes):
        raise ModelError(
            f"{one.where}: the label {found} is outside of {classes.source}, whose classes are 0 "
            f"to {len(classes) - 1}"
        )
    return found


def _text(one: Told) -> str | None:
    """What an image's class is called; None where there is only a number, or nothing."""
    value, name = one.label.value, one.label.name
    if value is None and name is None:
        return one.folder
    return value if isinstance(value, str) else name


def _of_synset(
    one: Told, synset: str, number: int | None, classes: Classes, synsets: Mapping[str, int]
) -> int:
    if not synsets:
        instead = "" if number is None else f"; or --match number, which takes its label {number}"
        raise ModelError(
            f"{one.where}: its class is the synset {synset}, and {classes.source} has names alone: "
            "give --synsets a file of both, such as LOC_synset_mapping.txt or "
            f"imagenet_class_index.json{instead}"
        )
    if synset not in synsets:
        raise ModelError(f"{one.where}: its synset {synset} has no name in {classes.source}")
    return synsets[synset]


def _of_name(one: Told, text: str, number: int | None, classes: Classes) -> int:
    found = classes.named(text)
    if len(found) == 1:
        return found[0]
    if number is not None and number in found:
        return number
    shown = repr(text[:60])
    if found:
        raise ModelError(
            f"{one.where}: {shown} is the name of several classes of {classes.source}: "
            f"{', '.join(map(str, found))}"
        )
    if one.label == Label():
        raise ModelError(
            f"{one.where}: brings no label of its own, and the folder that it is in, {shown}, is "
            f"none of the classes of {classes.source}"
        )
    if number is not None:
        raise ModelError(
            f"{one.where}: its label {number} stands for {shown}, which is none of the classes of "
            f"{classes.source}; --match number takes the numbers, whatever they stand for"
        )
    raise ModelError(f"{one.where}: its label {shown} is none of the classes of {classes.source}")


def _folder(id: str | None) -> str | None:
    """The folder that an image's name says it is in."""
    return (PurePosixPath(id).parent.name or None) if id else None


def _solution(path: Path) -> dict[str, tuple[int, str]]:
    """Line and label of each image's name."""
    rows = list(csv.reader(io.StringIO(read_text(path))))
    if not rows or rows[0] != ["ImageId", "PredictionString"]:
        raise ModelError(f"{path}, line 1: must be ImageId,PredictionString")
    found: dict[str, tuple[int, str]] = {}
    for line, row in enumerate(rows[1:], 2):
        words = row[1].split() if len(row) == 2 else []
        labels = list(dict.fromkeys(word for word in words if SYNSET.fullmatch(word)))
        if len(labels) != 1 or row[0] in found:
            raise ModelError(
                f"{path}, line {line}: must be a name that no other line has and one synset with "
                f"its boxes, got {','.join(row)[:60]!r}"
            )
        found[row[0]] = (line, labels[0])
    return found


def _solved(path: Path, solution: Mapping[str, tuple[int, str]], one: Told) -> Told:
    stem = PurePosixPath(one.id or "").name.partition(".")[0]
    if stem not in solution:
        raise ModelError(f"{one.where}: no line of {path} is of the image {stem!r}")
    line, synset = solution[stem]
    return replace(one, where=f"{path}, line {line}", label=Label(synset))
