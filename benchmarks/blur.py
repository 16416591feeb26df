"""What is still recognized in the blur of a blocked image, by the size of its grid.

    python benchmarks/blur.py PHOTOS --names names.txt --labels labels.txt \
        --autoencoder taef2_encoder.pth --cache DIR

PHOTOS holds pictures in the order of the labels (a class index a line; names.txt a name a line).
Each is blurred as `on_block: blur` does it, from the mean colors of a grid. The pixel teacher reads
blurs of the photos themselves, which show at least as much as those of a linear view of latents,
and blurs of that view; nano-flux2 reads the former as latents, at the size that is used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import readers
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.adapt.images import center_crop
from latentguard.encode.folders import find_pictures
from latentguard.encoders.nano import load_nano
from latentguard.evaluate.metrics import ranks_of, wilson
from latentguard.guard import blur
from latentguard.spaces import Latents
from latentguard.spaces.preview import linear_rgb

RESULTS = Path(__file__).parent / "results"
SIDES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
USED = blur.CELLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()
    files = find_pictures([arguments.photos])
    names = arguments.names.read_text().splitlines()
    labels = torch.tensor([int(line) for line in arguments.labels.read_text().split()])
    text = load_nano("nano-flux2").encode_text(names)
    pictures = np.stack([center_crop(file) for file in files])
    latents = readers.encode(pictures, arguments.autoencoder, arguments.cache / "zeroshot-256.npy")
    sources = {
        "the photo": readers.to_tensor(pictures) * 2 - 1,
        "the view of its latents": torch.cat(
            [linear_rgb(Latents(one.float(), "flux2", scaled=True)) for one in latents.split(8)]
        ),
    }
    whole = readers.teacher(pictures)
    rows = [found("teacher", "the photo", None, whole, labels, text)]
    for source, rgb in sources.items():
        for side in SIDES:
            posterior = readers.teacher(blurs(rgb, side, pictures.shape[1]))
            rows.append(found("teacher", source, side, posterior, labels, text))
            print(rows[-1], flush=True)
    seen = blurs(sources["the photo"], USED, pictures.shape[1])
    cache = arguments.cache / f"blur-{USED}.npy"
    read = readers.flux2(readers.encode(seen, arguments.autoencoder, cache))
    rows.append(found("nano-flux2", "the photo", USED, read, labels, text))
    write(rows, len(files), len(names))


def blurs(rgb: Tensor, side: int, size: int) -> NDArray[np.uint8]:
    """Blurs uint8 [B, size, size, 3] of pictures [B, 3, H, W] in [-1, 1]."""
    blur.CELLS = side
    try:
        return np.stack([blur.enlarged(grid, size, size) for grid in blur.means(rgb)])
    finally:
        blur.CELLS = USED


def found(
    reader: str, source: str, side: int | None, posterior: Tensor, labels: Tensor, text: Tensor
) -> dict[str, Any]:
    ranks = ranks_of(posterior @ text.T, labels)
    count = len(labels)
    right, near = int((ranks < 1).sum()), int((ranks < 5).sum())
    interval = wilson(right, count)
    return {
        "reader": reader,
        "blur_of": source,
        "side": side,
        "top1": right / count,
        "interval": [interval.low, interval.high],
        "top5": near / count,
    }


def write(rows: list[dict[str, Any]], photos: int, classes: int) -> None:
    lines = [
        f"{photos} photos of as many of {classes:,} classes; chance is {1 / classes:.1%} and "
        f"{5 / classes:.1%}. `on_block: blur` has a grid of {USED} x {USED}.",
        "",
        "| reader | blur of | grid | top-1 [95 %] | top-5 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        grid = "no blur" if row["side"] is None else f"{row['side']} x {row['side']}"
        low, high = row["interval"]
        lines.append(
            f"| {row['reader']} | {row['blur_of']} | {grid} | "
            f"{row['top1']:.3f} [{low:.3f}, {high:.3f}] | {row['top5']:.3f} |"
        )
    (RESULTS / "blur.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "blur.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
