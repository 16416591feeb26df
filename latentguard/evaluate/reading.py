"""Latents for measuring: every image counts, so one that cannot be read is an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from latentguard.errors import LatentsError
from latentguard.files import read_latents
from latentguard.spaces import Latents


def batches(
    paths: Sequence[str | Path],
    space: str | None = None,
    scaled: bool | None = None,
    batch_size: int = 16,
) -> Iterator[Latents]:
    """All images of the paths in their order, neighbors of equal size and space together.

    Raises:
        LatentsError: an image that cannot be read (it is named), or no images at all.
    """
    waiting: list[Latents] = []
    found = False
    for record in read_latents(paths, space, scaled):
        if record.latents is None:
            raise LatentsError(f"{record.source}[{record.index}]: {record.error}")
        found = True
        if waiting and (len(waiting) == batch_size or _kind(waiting[0]) != _kind(record.latents)):
            yield _join(waiting)
            waiting = []
        waiting.append(record.latents)
    if not found:
        raise LatentsError(f"no latents in {', '.join(map(str, paths))}")
    yield _join(waiting)


def _kind(latents: Latents) -> tuple[object, ...]:
    return latents.space, latents.scaled, latents.tensor.shape[1:], latents.tensor.dtype


def _join(parts: list[Latents]) -> Latents:
    first = parts[0]
    return Latents(torch.cat([part.tensor for part in parts]), first.space, first.scaled)
