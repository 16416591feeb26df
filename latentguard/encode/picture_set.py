"""Pictures for other commands: encoded once, kept in a folder, and read as files of latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from latentguard.encode.autoencoders import Autoencoder, load_autoencoder
from latentguard.encode.cache import Cache
from latentguard.encode.encoding import Encoded, Encoding, How, Mode
from latentguard.encode.framing import Crop
from latentguard.encode.samples import Problem, Sample
from latentguard.encode.sources import Labels, find_sources
from latentguard.errors import LatentsError
from latentguard.files import load_latents
from latentguard.spaces import Latents, LatentSpace


@dataclass(frozen=True)
class EncodedPicture:
    """A picture that was encoded.

    file: its latents, [1, C, h, w], which `read_latents` and `latentguard scan` read.
    """

    sample: Sample
    file: Path

    @property
    def id(self) -> str:
        """The picture's name."""
        return self.sample.id

    def latents(self) -> Latents:
        """A batch of one, under the picture's name."""
        found = load_latents(self.file)
        return Latents(found.tensor, found.space, found.scaled, ids=[self.id])


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures in the order of their sources.

    problems: those that could not be encoded. passed: how many files of which kinds are no
    pictures, for people; empty where there are none.
    """

    pictures: tuple[EncodedPicture, ...]
    problems: tuple[Problem, ...]
    passed: str = ""

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[EncodedPicture]:
        return iter(self.pictures)

    @property
    def files(self) -> list[Path]:
        """One latents file for each picture, which whatever reads latents takes."""
        return [one.file for one in self.pictures]

    def latents(self) -> Latents:
        """All of them as one batch. Raises LatentsError where their sizes differ."""
        return Latents.cat([one.latents() for one in self.pictures])


def encode_pictures(
    paths: Sequence[str | Path],
    autoencoder: str | Path | Autoencoder,
    *,
    cache: str | Path,
    size: str | int = "512",
    crop: Crop = "center",
    mode: Mode = "mean",
    seed: int = 0,
    space: str | Path | LatentSpace | None = None,
    device: torch.device | str | None = None,
    labels: Labels = "beside",
    batch_size: int | None = None,
    workers: int = 2,
    strict: bool = True,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> EncodedPictures:
    """Latents of pictures, of which those that `cache` holds are not encoded again.

    Args:
        paths: folders, picture files, WebDataset shards, Parquet files, datasets on disk.
        autoencoder: see `load_autoencoder`; loaded with `space` and `device` unless it is one.
        cache: a folder, which may be shared by all that encode pictures.
        size, crop, mode, seed: see `Framing` and `How`.
        strict: whether a picture that cannot be encoded is an error; else it is among `problems`.
        progress: called with how many are done, and of how many, if that is known.

    Raises:
        LatentsError: no pictures, none that could be encoded, or one that could not be (`strict`).
        ModelError: the autoencoder cannot be loaded or used.
    """
    if not isinstance(autoencoder, Autoencoder):
        autoencoder = load_autoencoder(autoencoder, space, device=device)
    how = How.of(autoencoder, size=size, crop=crop, mode=mode, seed=seed, batch_size=batch_size)
    sources = find_sources(paths, labels)
    kept = Cache(cache)
    said = how.said(autoencoder)
    counts = [unit.count() for unit in sources.units]
    total = None if None in counts else sum(count or 0 for count in counts)
    found: list[EncodedPicture] = []
    problems: list[Problem] = []
    with Encoding(autoencoder, how, workers, kept) as encoding:
        samples = (sample for unit in sources.units for sample in unit.samples())
        for done, item in enumerate(encoding.run(samples), 1):
            if isinstance(item, Encoded):
                found.append(EncodedPicture(item.sample, kept.path(item.sha256, said)))
            elif strict:
                raise LatentsError(f"{item.source}: {item.error}")
            else:
                problems.append(item)
            progress(done, total)
    if not found:
        raise LatentsError(f"no picture in {', '.join(map(str, paths))} could be encoded")
    return EncodedPictures(tuple(found), tuple(problems), str(sources.passed))
