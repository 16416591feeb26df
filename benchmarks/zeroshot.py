"""ImageNet-1k zero-shot accuracy of the nano models on photos, beside their pixel teacher's.

    python benchmarks/zeroshot.py PHOTOS --names names.txt --labels labels.txt \
        --autoencoder taef2_encoder.pth --cache DIR

PHOTOS holds pictures in the order of the labels (a class index a line; names.txt a name a line).
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

from latentguard.adapt.images import center_crop, find_images
from latentguard.encoders.nano import load_nano
from latentguard.evaluate.metrics import ranks_of

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--large", type=int, default=100, help="photos also read at 512 px")
    arguments = parser.parse_args()
    files = find_images([arguments.photos])
    names = arguments.names.read_text().splitlines()
    labels = torch.tensor([int(line) for line in arguments.labels.read_text().split()])
    text = load_nano("nano-flux2").encode_text(names)
    pictures = np.stack([center_crop(file) for file in files])
    latents = readers.encode(pictures, arguments.autoencoder, arguments.cache / "zeroshot-256.npy")
    some = np.linspace(0, len(files) - 1, min(arguments.large, len(files))).astype(int)
    large = np.stack([center_crop(files[i], 512) for i in some])
    large_latents = readers.encode(
        large, arguments.autoencoder, arguments.cache / "zeroshot-512.npy"
    )
    teacher = readers.teacher(pictures)
    posteriors = {
        "EfficientNet-Lite2 on pixels, 256 px": (teacher, labels),
        "nano-flux2, 256 px": (readers.flux2(latents), labels),
        f"EfficientNet-Lite2 on pixels, {len(some)} of them": (teacher[some], labels[some]),
        f"nano-flux2, 256 px, {len(some)} of them": (readers.flux2(latents[some]), labels[some]),
        f"nano-flux2, 512 px, {len(some)} of them": (readers.flux2(large_latents), labels[some]),
    }
    rows = [accuracy(name, *pair, text) for name, pair in posteriors.items()]
    lines = ["| reader | photos | top-1 | top-5 | of the teacher's top-1 |", "| --- " * 5 + "|"]
    ceiling = {row["n"]: row["top1"] for row in rows if "pixels" in row["name"]}
    for row in rows:
        share = row["top1"] / ceiling[row["n"]]
        cells = (row["name"], row["n"], f"{row['top1']:.3f}", f"{row['top5']:.3f}", f"{share:.1%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "zeroshot.json").write_text(json.dumps(rows, indent=1))
    (RESULTS / "zeroshot.md").write_text("\n".join(lines) + "\n")


def accuracy(name: str, posterior: Tensor, labels: Tensor, text: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 by cosine with the class names' embeddings."""
    ranks = ranks_of((posterior @ text.T).numpy(), labels.numpy())
    return {
        "name": name,
        "n": len(ranks),
        "top1": float((ranks < 1).mean()),
        "top5": float((ranks < 5).mean()),
    }


if __name__ == "__main__":
    main()
