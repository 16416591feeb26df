"""Examples: latents, as the vectors that are learned on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard.encoders import Encoder, best_encoder, load_encoder, needs_space
from latentguard.encoders.examples import example_rows
from latentguard.errors import LatentsError, ModelError
from latentguard.files import Reading
from latentguard.files.reading import read_records
from latentguard.spaces import Latents

BATCH = 16
Tick = Callable[[int], None]
"""Called with the number of examples that were read so far."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one side, as a model sees them.

    rows: [n, F] float32, unit norm. names: n, where each comes from.
    joint: [dim] float32, the mean of their embeddings in the model's joint space.
    sizes: (height, width) in latent cells that there are among them; empty where it is not known.
    """

    rows: NDArray[np.float32]
    names: tuple[str, ...]
    joint: NDArray[np.float32]
    sizes: frozenset[tuple[int, int]] = frozenset()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Named:
    """One image's latents [1, C, H, W], and where they come from."""

    name: str
    latents: Latents


def of_files(paths: Sequence[str | Path], reading: Reading) -> Iterator[Named]:
    """Every image of latents files. Raises LatentsError for one that cannot be read (named)."""
    for record in read_records(list(paths), reading):
        where = record.source if record.index == 0 else f"{record.source}, image {record.index}"
        if record.latents is None:
            raise LatentsError(f"{where}: {record.error}")
        yield Named(record.id or where, record.latents.to_torch())


def known_space(found: Iterator[Named], side: str) -> tuple[str, Iterator[Named]]:
    """The latent space of the first image, and all of them. LatentsError where there are none."""
    first = next(found, None)
    if first is None:
        raise LatentsError(f"there are no {side} in what was given")
    return first.latents.space.name, chain([first], found)


def encoder_for(model: str, space: str, device: str | None = None) -> Encoder:
    """A model by its name, or "auto": the best one for a space. Raises ModelError."""
    if model == "auto":
        model = best_encoder(space)
    return load_encoder(model, device, space if needs_space(model) else None)


def examples(
    images: Iterable[Named], encoder: Encoder, side: str, tick: Tick = lambda done: None
) -> Examples:
    """The vectors of images as an encoder sees them.

    side: "positives" or "negatives", for errors.

    Raises:
        LatentsError: none at all, or latents of another space than the encoder's.
        ModelError: the encoder gives numbers that are not finite.
    """
    rows, names, joint = [], [], []
    sizes: set[tuple[int, int]] = set()
    for batch in _batches(images):
        found, embedded = _rows(batch, encoder)
        for one, row in zip(batch, found, strict=True):
            if not np.isfinite(row).all() or not row.any():
                raise ModelError(
                    f"{one.name}: {encoder.name} gives no finite features for it, so nothing can "
                    "be learned from it"
                )
        rows.append(found)
        sizes.add((batch[0].latents.tensor.shape[-2], batch[0].latents.tensor.shape[-1]))
        joint.append(embedded.sum(0))
        names += [one.name for one in batch]
        tick(len(names))
    if not names:
        raise LatentsError(f"there are no {side} in what was given")
    mean = np.sum(joint, 0) / len(names)
    return Examples(np.concatenate(rows), tuple(names), mean.astype(np.float32), frozenset(sizes))


def _rows(batch: list[Named], encoder: Encoder) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    first = batch[0].latents
    if first.space.name != encoder.space:
        raise LatentsError(
            f"{batch[0].name}: is of {first.space.name} latents, and {encoder.name} reads "
            f"{encoder.space}: give examples of that space, or another --model"
        )
    tensor = torch.cat([one.latents.tensor.float() for one in batch])
    rows, joint = example_rows(encoder, Latents(tensor, first.space, first.scaled))
    return rows.cpu().numpy(), joint.cpu().double().numpy()


def _batches(images: Iterable[Named]) -> Iterator[list[Named]]:
    """Neighbors of one kind together."""
    waiting: list[Named] = []
    for one in images:
        spatial = Named(one.name, one.latents.to_spatial())
        if waiting and (len(waiting) == BATCH or _kind(waiting[0]) != _kind(spatial)):
            yield waiting
            waiting = []
        waiting.append(spatial)
    if waiting:
        yield waiting


def _kind(one: Named) -> tuple[object, ...]:
    return one.latents.space, one.latents.scaled, one.latents.tensor.shape[1:]
