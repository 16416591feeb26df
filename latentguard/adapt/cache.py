"""Latents and teacher targets on disk: computed once, resumable, memory-mapped while training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.adapt.images import SIZE, random_crop
from latentguard.adapt.progress import Progress
from latentguard.adapt.teacher import Teacher
from latentguard.atomic import replacing
from latentguard.encode.autoencoders import Autoencoder
from latentguard.encoders.lite import ENTRY_CHANNELS, HEAD_CHANNELS
from latentguard.errors import LatentsError

SCHEMA_VERSION = 2
SAVE_EVERY = 64
BATCH = 4


@dataclass
class Meta:
    """What a cache folder holds; stored beside the arrays as cache.json."""

    schema_version: int
    images: int
    done: int
    seed: int
    space: str
    scaled: bool
    channels: int
    autoencoder: str


class Cache:
    """Crops, latents and targets of `images` photos, all float16 or uint8 memory maps.

    crops [N, 256, 256, 3] uint8; latents [N, C, 32, 32]; entries [N, 48, 32, 32] (block 4);
    heads [N, 1280, 8, 8] (before pooling). Without an autoencoder there are no latents.
    """

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder = folder
        self.meta = meta
        n, grid = meta.images, SIZE // 8
        self.crops = self._array("crops", "u1", (n, SIZE, SIZE, 3))
        self.entries = self._array("entries", "f2", (n, ENTRY_CHANNELS, grid, grid))
        self.heads = self._array("heads", "f2", (n, HEAD_CHANNELS, grid // 4, grid // 4))
        self.latents: NDArray[Any] | None = None
        if meta.channels:
            self.latents = self._array("latents", "f2", (n, meta.channels, grid, grid))

    def _array(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.folder / f"{name}.npy"
        if path.exists():
            array = np.load(path, mmap_mode="r+", allow_pickle=False)
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise LatentsError(
                    f"{path}: {array.dtype} {list(array.shape)}, but cache.json asks for "
                    f"{np.dtype(dtype)} {list(shape)}; delete the cache folder to make it again"
                )
            mapped: NDArray[Any] = array
            return mapped
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    def save(self) -> None:
        """Make what was computed so far survive an interruption."""
        for array in (self.crops, self.entries, self.heads, self.latents):
            if isinstance(array, np.memmap):
                array.flush()
        with replacing(self.folder / "cache.json") as file:
            file.write(json.dumps(asdict(self.meta), indent=1).encode())

    def batch(self, name: str, index: NDArray[np.intp]) -> Tensor:
        """Rows of one array, as float32."""
        array = getattr(self, name)
        return torch.from_numpy(np.asarray(array[np.sort(index)], dtype=np.float32))


def prepare(
    folder: Path,
    images: Sequence[Path],
    autoencoder: Autoencoder | None,
    teacher: Teacher,
    *,
    space: str,
    seed: int = 0,
) -> Cache:
    """Crop, encode and label the photos into `folder`, going on where an earlier run stopped.

    Raises LatentsError when the folder holds another set (images, seed, space or autoencoder).
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = Meta(
        SCHEMA_VERSION,
        len(images),
        0,
        seed,
        space,
        True,
        autoencoder.space.channels if autoencoder else 0,
        autoencoder.name if autoencoder else "",
    )
    description = folder / "cache.json"
    if description.exists():
        values = json.loads(description.read_text())
        if values.get("schema_version") != SCHEMA_VERSION:
            raise LatentsError(
                f"{description}: was written by another version of latentguard; give another "
                "--cache folder"
            )
        found = Meta(**values)
        for key, value in asdict(wanted).items():
            if key != "done" and getattr(found, key) != value:
                raise LatentsError(
                    f"{description}: {key} is {getattr(found, key)!r}, this run wants {value!r}; "
                    "give another --cache folder"
                )
        wanted = found
    cache = Cache(folder, wanted)
    order = np.random.default_rng(seed).permutation(len(images))
    with Progress("encoding photos", len(images), cache.meta.done) as progress:
        while cache.meta.done < len(images):
            rows = range(cache.meta.done, min(cache.meta.done + BATCH, len(images)))
            crops = np.stack([random_crop(images[order[row]], seed + row) for row in rows])
            pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
            entry, head = teacher.targets(pixels)
            cache.crops[rows.start : rows.stop] = crops
            cache.entries[rows.start : rows.stop] = entry.numpy()
            cache.heads[rows.start : rows.stop] = head.numpy()
            if autoencoder is not None and cache.latents is not None:
                # One at a time: larger batches fall out of the processor's cache.
                drawn = [
                    training_latents(autoencoder, one[None], seed + row)
                    for row, one in zip(rows, pixels, strict=True)
                ]
                cache.latents[rows.start : rows.stop] = torch.cat(drawn).numpy()
            cache.meta.done = rows.stop
            if rows.stop % SAVE_EVERY < BATCH or rows.stop == len(images):
                cache.save()
            progress.advance(len(rows))
    return cache


def training_latents(autoencoder: Autoencoder, images: Tensor, seed: int) -> Tensor:
    """Scaled latents [B, C, H/8, W/8], as models read them; drawn where there is a distribution."""
    seeds = [seed] * len(images) if autoencoder.samples else None
    return autoencoder.encode(images, seeds).to_scaled().tensor.cpu()
