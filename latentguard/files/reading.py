"""Paths to records: files, folders, globs and shards become one Record per image, lazily."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, Unpack

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.addresses import Remote, found, shown
from latentguard.files.bounds import MAX_MAGNITUDE
from latentguard.files.claims import Claims, Image, Payload, if_moments
from latentguard.files.mds import SHARDS, read_mds
from latentguard.files.numpy_files import open_npy, open_npz
from latentguard.files.options import Options, Reading
from latentguard.files.parquet import read_parquet
from latentguard.files.passed_over import PassedOver
from latentguard.files.paths import COMPRESSED_SHARDS, PICTURES, SUFFIXES, Unreadable
from latentguard.files.remote import Noted, copied, state_of_path
from latentguard.files.safetensors_files import open_safetensors
from latentguard.files.shards import Sample, member_window, read_samples, sample_claims
from latentguard.files.streams import open_regular, size_of, state_of, unchanged
from latentguard.files.tables import Row
from latentguard.files.tar import Member, printable
from latentguard.files.torch_files import open_torch
from latentguard.spaces import SPACES, Latents, LatentSpace, recognize
from latentguard.spaces.arrays import LatentArray, unpack, unpatchify, widened
from latentguard.spaces.statistics import MAX_IMAGES
from latentguard.spaces.tokens import check_layout, check_size

_OPENERS: dict[str, Callable[[BinaryIO, int, Claims, Reading], Payload]] = {
    ".pt": open_torch,
    ".pth": open_torch,
    ".safetensors": open_safetensors,
    ".latent": open_safetensors,
    ".npy": open_npy,
    ".npz": open_npz,
}


@dataclass(frozen=True)
class ArrayRecord:
    """One image of a file, or the reason why it cannot be read. Exactly one of latents and error is
    set.

    Attributes:
        source: the file, for a shard's member followed by "::" and the member's name.
        index: the image's number within the file (the whole shard), from 0.
        id: the image's name where the file gives one; in a shard its key.
        latents: a batch of one, [1, C, H, W], finite, in the file's own dtype and scaling.
        error: one sentence, without the source.
    """

    source: str
    index: int
    id: str | None
    latents: LatentArray | None
    error: str | None


@dataclass(frozen=True)
class Record:
    """As `ArrayRecord`, with the latents as a torch tensor, spatial."""

    source: str
    index: int
    id: str | None
    latents: Latents | None
    error: str | None


def read_latents(
    paths: Iterable[str | Path] | str | Path,
    space: str | Path | LatentSpace | None = None,
    scaled: bool | None = None,
    **options: Unpack[Options],
) -> Iterator[Record]:
    """`read_arrays`, as torch tensors. Also raises LatentsError if torch is not installed."""
    records = read_arrays(paths, space, scaled, **options)
    if importlib.util.find_spec("torch") is None:
        raise LatentsError("tensors need torch: pip install 'latentguard[torch]', or read_arrays")
    return (
        Record(
            r.source, r.index, r.id, None if r.latents is None else r.latents.to_torch(), r.error
        )
        for r in records
    )


def read_arrays(
    paths: Iterable[str | Path] | str | Path,
    space: str | Path | LatentSpace | None = None,
    scaled: bool | None = None,
    passed: PassedOver | None = None,
    **options: Unpack[Options],
) -> Iterator[ArrayRecord]:
    """Read latents files one image at a time, in a stable order, without torch.

    At most one image is in memory, plus the contents of a .pt inside a shard.

    Args:
        paths: files (`paths.SUFFIXES`), folders (searched recursively, sorted by name), glob
            patterns, ranges `{000..099}`, and addresses of other file systems (`s3://...`).
        space, scaled: what the files do not state themselves. A file that contradicts this is an
            error. A file that states nothing is recognized by its statistics or is an error. A
            scaling other than the usual one of the space can only be given by `space`; a file that
            declares one is an error.
        passed: counts the files and members that cannot be latents.
        options: everything else in `Reading`.

    Yields:
        ArrayRecords. Every problem with a file or an image becomes a record with an error, and the
        rest is read. So does a file that could hold latents but has a type that cannot be read.

    Raises:
        LatentsError: the space is unknown, or an option is impossible.
    """
    return read_records(paths, Reading.of(space, scaled, **options), passed)


def read_records(
    paths: Iterable[str | Path] | str | Path, reading: Reading, passed: PassedOver | None = None
) -> Iterator[ArrayRecord]:
    """`read_arrays`, with everything that is said of the files in one object."""
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    return _records(paths, reading, PassedOver() if passed is None else passed)


def load_latents(
    path: str | Path,
    space: str | Path | LatentSpace | None = None,
    scaled: bool | None = None,
    **options: Unpack[Options],
) -> Latents:
    """All images of one file as one batch, spatial, with its ids if every image has one.

    options: as for `read_arrays`.

    Raises:
        LatentsError: anything in the file cannot be read, or its images differ in size.
    """
    batches = []
    for record in read_latents([path], space, scaled, **options):
        if record.latents is None:
            where = record.source if record.index == 0 else f"{record.source}, image {record.index}"
            raise LatentsError(f"{where}: {record.error}")
        batches.append(record.latents)
    if not batches:
        raise LatentsError(f"{path}: holds no latents")
    sizes = {(latents.height, latents.width) for latents in batches}
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise LatentsError(f"{path}: images of several sizes ({shown}): use read_latents")
    return Latents.cat(batches)


def _records(
    paths: Iterable[str | Path], reading: Reading, passed: PassedOver
) -> Iterator[ArrayRecord]:
    for file in found(paths, passed, reading.strict):
        yield from read_file(file, reading, passed)


def read_file(
    file: Path | Remote | Unreadable,
    reading: Reading,
    passed: PassedOver,
    noted: Noted | None = None,
) -> Iterator[ArrayRecord]:
    """The records of one file; one that cannot be read is one with an error.

    noted: told what the file was before it was read.
    Raises OSError where this machine has no room for the copy of a remote file.
    """
    if isinstance(file, Unreadable):
        yield ArrayRecord(file.source, 0, None, None, file.error)
        return
    noted = Noted() if noted is None else noted
    if isinstance(file, Path):
        with suppress(OSError):
            noted.states[str(file)] = state_of_path(file)
        yield from _guarded(str(file), 0, _file(file, reading, passed))
        return
    name = shown(file.address)
    begun = perf_counter()
    try:
        with copied(file.address) as (path, state):
            noted.states[name] = state
            noted.copying += perf_counter() - begun
            for record in _guarded(str(path), 0, _file(path, reading, passed)):
                yield replace(record, source=name + record.source[len(str(path)) :])
    except LatentsError as error:
        yield ArrayRecord(name, 0, None, None, str(error))


def _guarded(source: str, index: int, records: Iterator[ArrayRecord]) -> Iterator[ArrayRecord]:
    """The records, and any exception as the last of them."""
    try:
        for record in records:
            index = record.index + 1
            yield record
    except LatentsError as error:
        yield ArrayRecord(source, index, None, None, str(error))
    except MemoryError:
        yield ArrayRecord(source, index, None, None, "needs more memory than is available")
    except Exception as error:  # a guard reports what it did not foresee; the rest is still read
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]
        yield ArrayRecord(source, index, None, None, f"cannot be read ({reason})")


# -- one file --------------------------------------------------------------------------------


def _file(path: Path, reading: Reading, passed: PassedOver) -> Iterator[ArrayRecord]:
    name = path.name.lower()
    if name.endswith(COMPRESSED_SHARDS):
        raise LatentsError(
            "is a compressed archive, whose unpacked size is not bounded: unpack it to .tar"
        )
    if name.endswith(PICTURES):
        raise LatentsError("is a picture, not latents: `latentguard encode` makes latents of it")
    if not name.endswith(SUFFIXES):
        raise LatentsError(f"is of an unknown type: known are {', '.join(SUFFIXES)}")
    with open_regular(path) as stream:
        before, size = state_of(stream, path), size_of(stream)
        if size == 0:
            raise LatentsError("is an empty file")
        if name.endswith(".tar"):
            records = _shard(path, stream, size, reading, passed)
        elif name.endswith(".parquet"):
            rows = read_parquet(stream, size, reading, passed, path.name)
            records = _rows(rows, str(path), reading, passed)
        elif name.endswith(SHARDS):
            rows = read_mds(stream, size, path, reading, passed)
            records = _rows(rows, str(path), reading, passed)
        else:
            payload = _OPENERS[path.suffix.lower()](stream, size, reading.said(), reading)
            records = _images(payload, str(path), 0, None, reading, passed)
        yield from unchanged(stream, path, before, records)


def _shard(
    path: Path,
    stream: BinaryIO,
    size: int,
    reading: Reading,
    passed: PassedOver,
) -> Iterator[ArrayRecord]:
    index = 0
    for sample in read_samples(stream, size, passed, reading):
        if isinstance(sample, LatentsError):
            yield ArrayRecord(str(path), index, None, None, str(sample))
            index += 1
            continue
        for member in sample.latents:
            source = f"{path}::{printable(member.name)}"
            records = _member(stream, sample, member, source, index, reading, passed)
            for record in _guarded(source, index, records):
                index = record.index + 1
                yield record


def _member(
    stream: BinaryIO,
    sample: Sample,
    member: Member,
    source: str,
    index: int,
    reading: Reading,
    passed: PassedOver,
) -> Iterator[ArrayRecord]:
    if member.size == 0:
        raise LatentsError("is an empty member")
    declared = sample_claims(stream, sample, reading)
    claims = declared.merged(reading.said(), "KEY.json", "the option given")
    suffix = os.path.splitext(member.name.lower())[1]
    if suffix not in _OPENERS:
        raise LatentsError(f"is of an unknown type: known are {', '.join(_OPENERS)}")
    payload = _OPENERS[suffix](member_window(stream, member), member.size, claims, reading)
    yield from _images(payload, source, index, printable(sample.key), reading, passed)


def _rows(
    rows: Iterator[Row | LatentsError], path: str, reading: Reading, passed: PassedOver
) -> Iterator[ArrayRecord]:
    """The records of a table's rows; whatever ends the table comes as the last one."""
    index, before = 0, passed.files.total()
    for row in rows:
        if isinstance(row, LatentsError):
            yield ArrayRecord(path, index, None, None, str(row))
            index += 1
            continue
        source = f"{path}::{row.place}"
        for record in _guarded(source, index, _cell(row, source, index, reading, passed)):
            index = record.index + 1
            yield record
    if index == 0 and passed.files.total() == before:
        raise LatentsError("holds no row")


def _cell(
    row: Row, source: str, index: int, reading: Reading, passed: PassedOver
) -> Iterator[ArrayRecord]:
    claims = row.claims.merged(reading.said(), "the row", "the option given")
    key = None if row.key is None else printable(row.key)
    yield from _images(row.open(claims), source, index, key, reading, passed)


# -- images ----------------------------------------------------------------------------------


def _images(
    payload: Payload,
    source: str,
    first: int,
    key: str | None,
    reading: Reading,
    passed: PassedOver,
) -> Iterator[ArrayRecord]:
    """The records of one payload: its convention is settled first, then image after image."""
    space, scaled = reading.space, reading.scaled
    given = Claims(space=None if space is None else space.name, scaled=scaled)
    claims = payload.claims.merged(given, "the file", "the option given")
    # The operator's may have a scaling of its own, or flux2's statistics.
    known = space if space is not None or claims.space is None else LatentSpace.get(claims.space)
    settled = _settle(payload, claims, known)
    if settled is not None:
        claims.check_scaling(*settled)
        _check_size(payload, claims, settled[0])
    passed.texts += payload.beside.texts
    passed.left += payload.beside.left
    names = payload.names(key)
    count = 0
    for number, image in enumerate(payload.images()):
        count = number + 1
        record = _record(source, first + number, next(names), image, settled, claims)
        yield _one_layout(record, image) if payload.twofold else record
    if count == 0:
        raise LatentsError("holds no image")
    payload.check_names(count)
    payload.beside.check()
    if reading.strict and payload.beside.texts:
        raise LatentsError("holds text embeddings, and with --strict no file is passed over")


def _check_size(payload: Payload, claims: Claims, space: LatentSpace) -> None:
    """One size is said for all packed images of a file, so the first of them speak for the rest.

    Raises LatentsError where the numbers of one deny it.
    """
    height, width = claims.size(space)
    if height is None or width is None:
        return
    for image in itertools.islice(payload.images(), MAX_IMAGES):
        if isinstance(image, LatentsError) or image.ndim != 2:
            continue
        try:
            space.size((1, *image.shape), "packed", height, width)
        except LatentsError:
            continue  # an image of another size is an error of its own
        check_size(space.canonical(widened(image))[None], space, height, width)


def _settle(
    payload: Payload, claims: Claims, known: LatentSpace | None
) -> tuple[LatentSpace, bool] | None:
    """Space and scaling as declared or recognized; None where no image can be used anyway.

    Raises:
        LatentsError: the question that the file leaves open.
    """
    if known is not None and claims.scaled is not None:
        return known, claims.scaled
    images = (image for image in payload.images() if not isinstance(image, LatentsError))
    usable = (widened(image) for image in images if _problem(image) is None)
    sample = list(itertools.islice(usable, MAX_IMAGES))
    if not sample:
        return None
    sample = [_recognizable(image, known, claims) for image in sample]
    found = recognize(sample, known, claims.scaled)
    if found.space is None or found.scaled is None:
        raise LatentsError(found.question)
    return known or LatentSpace.get(found.space), found.scaled


def _recognizable(image: Image, known: LatentSpace | None, claims: Claims) -> Image:
    """Cells [C, H, W], as statistics are of; FLUX.2's tokens alone can be recognized by theirs.

    Raises LatentsError for other tokens, and for those whose size is not said or is denied.
    """
    if image.ndim != 2:
        return image
    space = SPACES["flux2"] if known is None else known
    if image.shape[1] != space.packed_channels or space.name != "flux2":
        raise LatentsError(
            "packed latents are not recognized by their statistics: declare their space and "
            "scaling in the file, or say --space and --scaled or --unscaled"
        )
    cells: Image = unpack(image[None], space, *claims.size(space))[0]
    return cells


def _record(
    source: str,
    index: int,
    name: str | None,
    image: Image | LatentsError,
    settled: tuple[LatentSpace, bool] | None,
    claims: Claims,
) -> ArrayRecord:
    problem = _problem(image)
    if problem is None and settled is None:
        problem = "its space and scaling are unknown"
    if problem is not None or settled is None or isinstance(image, LatentsError):
        return ArrayRecord(source, index, name, None, problem)
    space, scaled = settled
    batch = image[None]
    try:
        if image.ndim == 2:
            batch = unpack(batch, space, *claims.size(space))
        elif _is_patches(image, space, claims):
            batch = unpatchify(batch, space)
        space.size(batch.shape, "spatial", claims.height, claims.width)
        latents = LatentArray(batch, space, scaled, None if name is None else (name,))
        return ArrayRecord(source, index, name, latents, None)
    except LatentsError as error:
        advice = if_moments(image.shape[0], {space.channels}) if image.ndim == 3 else ""
        if "are pixels" in str(error):
            advice = ", or say --pixels"
        return ArrayRecord(source, index, name, None, f"{error}{advice}")


def _is_patches(image: Image, space: LatentSpace, claims: Claims) -> bool:
    """Whether [C, H, W] holds patches of cells: as declared, or since nothing else fits."""
    if claims.layout is not None:
        return claims.layout == "patches"
    return space.packs and image.shape[0] == space.packed_channels != space.channels


def _one_layout(record: ArrayRecord, image: Image | LatentsError) -> ArrayRecord:
    """A record of an image whose shape is of both layouts, or the error that it is of the other."""
    if record.latents is None or isinstance(image, LatentsError):
        return record
    try:
        space = record.latents.space
        numbers = widened(image)
        check_layout(space.canonical(numbers) if image.ndim == 2 else numbers, space)
    except LatentsError as error:
        return replace(record, latents=None, error=str(error))
    return record


def _problem(image: Image | LatentsError) -> str | None:
    """Why an image cannot be used, whatever its space; None where it can."""
    if isinstance(image, LatentsError):
        return str(image)
    numbers = widened(image)
    if not np.isfinite(numbers).all():
        return "the latents hold NaN or Inf"
    largest = max(float(numbers.max(initial=0)), -float(numbers.min(initial=0)))
    if largest > MAX_MAGNITUDE:
        return f"the latents hold numbers up to {largest:.3g}; none exceed {MAX_MAGNITUDE:g}"
    return None
