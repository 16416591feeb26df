"""Caltech-101 photos as FLUX.2 latents with labels, encoded once and kept by class.

    python benchmarks/caltech.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR
    python benchmarks/caltech.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR2 \\
        --trained 600

Largest centered square at 256 px, [32, 32, 32] float16, ids `class/image_0001`. `seen` tells which
photos the bundled nano-flux2 was trained on: every photo whose number is not divisible by 5 is in
its training list, and the bundled weights saw the first 5,200 of that list. `--trained N` encodes
the first N of these: photos that nothing may be measured on.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentguard.adapt.hold_out import held_out
from latentguard.adapt.images import center_crop
from latentguard.adapt.progress import Progress
from latentguard.encode.autoencoders import Autoencoder, load_autoencoder
from latentguard.files import load_latents, save_latents
from latentguard.spaces import Latents

SEEN = 5200


def files(folder: Path) -> list[Path]:
    """All photos of a Caltech-101 folder in the order of their paths."""
    return sorted(folder.glob("*/*.jpg"))


def identity(path: Path) -> str:
    """`class/image_0001`."""
    return f"{path.parent.name}/{path.stem}"


def label(name: str) -> str:
    """The class in an id."""
    return name.split("/")[0]


def trained(folder: Path) -> list[Path]:
    """The photos that the bundled nano-flux2 was trained on, in random order."""
    listed = [path for path in files(folder) if not held_out(path, 5)]
    random.Random(0).shuffle(listed)
    return listed[:SEEN]


def seen(folder: Path) -> set[str]:
    """Ids of the photos that the bundled nano-flux2 was trained on."""
    return {identity(path) for path in trained(folder)}


def choose(folder: Path, everything_of: Sequence[str], per_class: int) -> list[Path]:
    """All photos of some classes, and up to `per_class` held-out ones of each other class."""
    chosen: list[Path] = []
    count: dict[str, int] = {}
    for path in files(folder):
        name = path.parent.name
        if name in everything_of:
            chosen.append(path)
        elif held_out(path, 5) and count.get(name, 0) < per_class:
            count[name] = count.get(name, 0) + 1
            chosen.append(path)
    return chosen


def encode(
    paths: Sequence[Path], autoencoder: Path, cache: Path, threads: int | None = None
) -> Latents:
    """Latents of the photos, in order; what is not in `cache` (one file a class) is encoded."""
    if threads:
        torch.set_num_threads(threads)
    cache.mkdir(parents=True, exist_ok=True)
    by_class: dict[str, list[Path]] = {}
    for path in paths:
        by_class.setdefault(path.parent.name, []).append(path)
    found: dict[str, Tensor] = {}
    model: Autoencoder | None = None
    with Progress("encoding photos", len(paths)) as progress:
        for name, wanted in by_class.items():
            kept = cache / f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.pt"
            known: dict[str, Tensor] = {}
            if kept.is_file():
                for batch in load_latents(kept):
                    known[(batch.ids or ("",))[0]] = batch.tensor[0]
            missing = [path for path in wanted if identity(path) not in known]
            for path in missing:
                model = model or load_autoencoder(autoencoder)
                image = torch.from_numpy(center_crop(path).copy()).permute(2, 0, 1).float() / 255
                known[identity(path)] = model.encode(image[None]).tensor.half()[0]
            if missing:
                tensor = torch.stack([known[key] for key in sorted(known)])
                save_latents(kept, Latents(tensor, "flux2", scaled=True, ids=sorted(known)))
            found |= {identity(path): known[identity(path)] for path in wanted}
            progress.advance(len(wanted))
    ids = [identity(path) for path in paths]
    return Latents(torch.stack([found[key] for key in ids]), "flux2", scaled=True, ids=ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="Caltech-101's 101_ObjectCategories")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--all-of", nargs="*", default=["revolver", "cannon"])
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--trained", type=int, help="so many training photos instead")
    parser.add_argument("--threads", type=int)
    a = parser.parse_args()
    paths = choose(a.photos, a.all_of, a.per_class)
    if a.trained is not None:
        paths = trained(a.photos)[: a.trained]
    print(encode(paths, a.autoencoder, a.cache, a.threads))


if __name__ == "__main__":
    main()
