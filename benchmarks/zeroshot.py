"""ImageNet-1k zero-shot accuracy of the nano models on photos, beside their pixel teacher's.

    python benchmarks/zeroshot.py PHOTOS --names names.txt --labels labels.txt \
        --autoencoder taef2_encoder.pth --cache DIR

PHOTOS holds pictures in the order of the labels (a class index a line; names.txt a name a line).
All of them are read at 256 px. `first` are some, evenly chosen, with which it was decided how
larger latents are read (and sixty more at 1024 px); `others` are as many that nothing was decided
with, read at 512 and 1024 px, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import readers
import torch
from torch import Tensor

from latentguard.adapt.images import center_crop
from latentguard.encode.folders import find_pictures
from latentguard.encoders.nano import load_nano
from latentguard.evaluate.metrics import ranks_of, wilson

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument(
        "--large", type=int, default=100, help="photos also read at 512 px and more"
    )
    arguments = parser.parse_args()
    files = find_pictures([arguments.photos])
    names = arguments.names.read_text().splitlines()
    labels = torch.tensor([int(line) for line in arguments.labels.read_text().split()])
    text = load_nano("nano-flux2").encode_text(names)
    pictures = np.stack([center_crop(file) for file in files])
    latents = readers.encode(pictures, arguments.autoencoder, arguments.cache / "zeroshot-256.npy")
    some = np.linspace(0, len(files) - 1, min(arguments.large, len(files))).astype(int)
    looked_at = np.union1d(some, np.linspace(0, len(files) - 1, 60).astype(int))
    rest = np.setdiff1d(np.arange(len(files)), looked_at)
    others = rest[np.linspace(0, len(rest) - 1, min(arguments.large, len(rest))).astype(int)]
    teacher = readers.teacher(pictures)
    posteriors = {
        "EfficientNet-Lite2 on pixels, 256 px": (teacher, labels),
        "nano-flux2, 256 px": (readers.flux2(latents), labels),
    }
    for group, chosen, sizes in (("first", some, (512,)), ("others", others, (512, 1024))):
        posteriors[f"EfficientNet-Lite2 on pixels, {group}"] = (teacher[chosen], labels[chosen])
        posteriors[f"nano-flux2, 256 px, {group}"] = (
            readers.flux2(latents[chosen]),
            labels[chosen],
        )
        for size in sizes:
            large = np.stack([center_crop(files[i], size) for i in chosen])
            cache = arguments.cache / f"zeroshot-{group}-{size}.npy"
            read = readers.flux2(readers.encode(large, arguments.autoencoder, cache))
            posteriors[f"nano-flux2, {size} px, {group}"] = (read, labels[chosen])
    rows = [accuracy(name, *pair, text) for name, pair in posteriors.items()]
    lines = [
        "| reader | photos | top-1 [95 %] | top-5 | of the teacher's top-1 |",
        "| --- " * 5 + "|",
    ]
    ceiling = 1.0
    for row in rows:
        if "pixels" in row["name"]:
            ceiling = row["top1"]
        low, high = row["top1_95"]
        top = f"{row['top1']:.3f} [{low:.2f}, {high:.2f}]"
        cells = (row["name"], row["n"], top, f"{row['top5']:.3f}", f"{row['top1'] / ceiling:.1%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "zeroshot.json").write_text(json.dumps(rows, indent=1))
    (RESULTS / "zeroshot.md").write_text("\n".join(lines) + "\n")


def accuracy(name: str, posterior: Tensor, labels: Tensor, text: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 by cosine with the class names' embeddings."""
    ranks = ranks_of((posterior @ text.T).numpy(), labels.numpy())
    interval = wilson(int((ranks < 1).sum()), len(ranks))
    return {
        "name": name,
        "n": len(ranks),
        "top1_95": [interval.low, interval.high],
        "top1": float((ranks < 1).mean()),
        "top5": float((ranks < 5).mean()),
    }


if __name__ == "__main__":
    main()
