"""From samples to latents: threads decode them, and batches are encoded, in the original order."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.encode.autoencoders import Autoencoder, Dtype
from latentguard.encode.cache import Cache, Kept
from latentguard.encode.framing import Box, Crop, Framing
from latentguard.encode.pictures import decode_picture
from latentguard.encode.samples import Problem, Sample
from latentguard.errors import LatentsError, ModelError, UsageError
from latentguard.spaces import Latents

Mode = Literal["mean", "sample"]
"""Of the distribution that an autoencoder gives: its mean, or one drawn from it."""

_WINDOW = 4
"""Batches that are decoded before they are encoded, so that pictures of a size come together."""


@dataclass(frozen=True)
class How:
    """How pictures become latents.

    Attributes:
        framing: which part of them, at which size.
        mode, seed: of the latents' distribution. What is drawn depends on the seed and on the
            picture's bytes alone.
        scaled: the convention that is written. store: the type.
        batch_size: pictures of a size that are encoded together.
    """

    framing: Framing
    mode: Mode = "mean"
    seed: int = 0
    scaled: bool = True
    store: Dtype = "float32"
    batch_size: int = 8

    @classmethod
    def of(
        cls,
        autoencoder: Autoencoder,
        *,
        size: str | int = "512",
        crop: Crop = "center",
        scaled: bool | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> How:
        """With what the autoencoder asks for.

        scaled: None is scaled, but where the autoencoder has a scaling of its own that is not its
        space's usual one: raw latents are then read by everybody, and are what is written.

        batch_size: None is 1 on the CPU, where larger batches are slower, and 8 elsewhere.

        Raises:
            UsageError: a size that is no multiple of what the autoencoder needs, or `sample` of one
                that gives no distribution.
            LatentsError: a scaling that the autoencoder's space cannot be brought to.
        """
        if scaled is None:
            scaled = autoencoder.scaled or autoencoder.space.is_scaled_as(
                autoencoder.space.standard
            )
        if batch_size is None:
            batch_size = 1 if autoencoder.device.type == "cpu" else 8
        framing = Framing.parse(size, crop, autoencoder.multiple)
        how = cls(framing, scaled=scaled, batch_size=batch_size, **options)
        if how.mode == "sample" and not autoencoder.samples:
            raise UsageError(
                f"{autoencoder.name} gives one latent for a picture and no distribution: use "
                "--mode mean"
            )
        cells = autoencoder.space.packed_patch
        blank = torch.zeros(1, autoencoder.space.channels, cells, cells)
        _converted(Latents(blank, autoencoder.space, autoencoder.scaled), scaled)
        return how

    def said(self, autoencoder: Autoencoder) -> dict[str, Any]:
        """Everything that the numbers of a picture's latents depend on, as data for JSON."""
        framing = self.framing
        size = list(framing.size) if isinstance(framing.size, tuple) else framing.size
        return {
            "autoencoder": {"name": autoencoder.name, "sha256": autoencoder.sha256},
            "space": autoencoder.space.name,
            "scaled": self.scaled,
            "size": size,
            "crop": framing.crop,
            "multiple": framing.multiple,
            "mode": self.mode,
            "seed": self.seed if self.mode == "sample" else None,
            "dtype": autoencoder.dtype,
            "store": self.store,
        }


@dataclass(frozen=True)
class Encoded:
    """A picture's latents.

    latents: a batch of one, on the CPU. width, height: of the picture, upright, in pixels. box: the
    part of it that was encoded. sha256: of the picture's bytes.
    """

    sample: Sample
    latents: Latents
    width: int
    height: int
    box: Box
    sha256: str


@dataclass(frozen=True)
class _Frame:
    """A picture that waits to be encoded: uint8 [H, W, 3]."""

    sample: Sample
    pixels: NDArray[np.uint8]
    width: int
    height: int
    box: Box
    sha256: str


_Ready = _Frame | Encoded | Problem


class Encoding:
    """Encodes samples; use it in a `with` block, as it has threads.

    workers: threads that decode pictures. cache: latents that were encoded before, by picture.
    """

    def __init__(
        self, autoencoder: Autoencoder, how: How, workers: int = 2, cache: Cache | None = None
    ) -> None:
        self.autoencoder, self.how = autoencoder, how
        self._said = how.said(autoencoder)
        self._cache = cache
        self._workers = max(1, workers)
        self._pool = ThreadPoolExecutor(self._workers)

    def __enter__(self) -> Encoding:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, samples: Iterable[Sample | Problem]) -> Iterator[Encoded | Problem]:
        """The latents of each sample, or the reason why there are none, in order."""
        ready = self._decoded(iter(samples))
        window = _WINDOW * self.how.batch_size
        while waiting := list(itertools.islice(ready, window)):
            yield from self._encoded(waiting)

    # -- decoding ----------------------------------------------------------------------------

    def _decoded(self, samples: Iterator[Sample | Problem]) -> Iterator[_Ready]:
        ahead = 2 * self._workers
        pending: deque[Problem | Future[_Ready]] = deque()
        for sample in samples:
            pending.append(self._submitted(sample))
            if len(pending) > ahead:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())

    def _submitted(self, sample: Sample | Problem) -> Problem | Future[_Ready]:
        if isinstance(sample, Problem):
            return sample
        data: bytes | None = None
        if not sample.anywhere:
            try:
                data = sample.read()
            except LatentsError as error:
                return Problem(sample.source, str(error), sample.id)
        return self._pool.submit(self._prepared, sample, data)

    def _prepared(self, sample: Sample, data: bytes | None) -> _Ready:
        try:
            data = sample.read() if data is None else data
            sha256 = hashlib.sha256(data).hexdigest()
            kept = None if self._cache is None else self._cache.get(sha256, self._said)
            if kept is not None:
                latents = Latents(
                    kept.tensor, self.autoencoder.space, self.how.scaled, ids=[sample.id]
                )
                return Encoded(sample, latents, kept.width, kept.height, kept.box, sha256)
            image = decode_picture(data)
            pixels, box = self.how.framing.apply(image)
        except LatentsError as error:
            return Problem(sample.source, str(error), sample.id)
        return _Frame(sample, pixels, *image.size, box, sha256)

    # -- encoding ----------------------------------------------------------------------------

    def _encoded(self, waiting: list[_Ready]) -> list[Encoded | Problem]:
        """The window's results, in its order; pictures of one size are encoded together."""
        done: dict[int, Encoded | Problem] = {}
        sizes: dict[tuple[int, ...], list[int]] = {}
        for place, item in enumerate(waiting):
            if isinstance(item, _Frame):
                sizes.setdefault(item.pixels.shape, []).append(place)
            else:
                done[place] = item
        for places in sizes.values():
            for first in range(0, len(places), self.how.batch_size):
                batch = places[first : first + self.how.batch_size]
                frames = [item for place in batch if isinstance(item := waiting[place], _Frame)]
                done.update(zip(batch, self._batch(frames), strict=True))
        return [done[place] for place in range(len(waiting))]

    def _batch(self, frames: list[_Frame]) -> list[Encoded | Problem]:
        pixels = np.stack([frame.pixels for frame in frames])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        seeds = None
        if self.how.mode == "sample":
            seeds = [picture_seed(self.how.seed, frame.sha256) for frame in frames]
        try:
            latents = self.autoencoder.encode(images, seeds)
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n", 1)[0][:300]
            raise ModelError(
                f"{self.autoencoder.name} could not encode {len(frames)} pictures of "
                f"{pixels.shape[2]} x {pixels.shape[1]} px ({reason}); --batch-size 1 and --dtype "
                "bfloat16 need less memory"
            ) from error
        tensor = _converted(latents, self.how.scaled).tensor.to(getattr(torch, self.how.store))
        held = tensor.cpu()
        return [self._one(frame, held[n : n + 1]) for n, frame in enumerate(frames)]

    def _one(self, frame: _Frame, tensor: Tensor) -> Encoded | Problem:
        if not bool(torch.isfinite(tensor).all()):
            return Problem(
                frame.sample.source,
                f"its latents are not finite in {self.autoencoder.dtype}, stored as "
                f"{self.how.store}",
                frame.sample.id,
            )
        tensor = tensor.clone()  # not a view that keeps its whole batch
        latents = Latents(tensor, self.autoencoder.space, self.how.scaled, ids=[frame.sample.id])
        if self._cache is not None:
            kept = Kept(tensor, frame.width, frame.height, frame.box)
            self._cache.put(frame.sha256, self._said, kept, latents)
        return Encoded(frame.sample, latents, frame.width, frame.height, frame.box, frame.sha256)


def picture_seed(seed: int, sha256: str) -> int:
    """The seed of a picture's noise, by the SHA-256 of its bytes."""
    mixed = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    return int.from_bytes(mixed[:8], "big") >> 1


def _converted(latents: Latents, scaled: bool) -> Latents:
    return latents.to_scaled() if scaled else latents.to_raw()


def _result(item: Problem | Future[_Ready]) -> _Ready:
    return item if isinstance(item, Problem) else item.result()
