"""How much of the latents of a smaller picture the halving of nano-flux2 explains, and the mean.

    python benchmarks/halving.py CALTECH101 --autoencoder taef2_encoder.pth

Crops of 256 px of Caltech-101's held-out fifth, and the same at 128 px, are encoded by the given
autoencoder of FLUX.2. R² is over all channels and cells.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import readers
import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.adapt.hold_out import held_out
from latentguard.encode.autoencoders import load_autoencoder
from latentguard.encode.folders import find_pictures, random_crop
from latentguard.encoders.nano import load_nano

RESULTS = Path(__file__).parent / "results"


def explained(found: Tensor, wanted: Tensor) -> float:
    """R² of latents [N, C, h, w]."""
    rest = (found - wanted).square().sum()
    return float(1 - rest / (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("caltech", type=Path)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    a = parser.parse_args()
    photos = [file for file in find_pictures([a.caltech]) if held_out(file, 5)]
    chosen = random.Random(0).sample(photos, a.count)
    crops = np.stack([random_crop(file, number) for number, file in enumerate(chosen)])
    encoder = load_autoencoder(a.autoencoder)
    large, small = [], []
    for crop in readers.to_tensor(crops).split(4):
        half = F.interpolate(crop, scale_factor=0.5, mode="bilinear", antialias=True)
        large.append(encoder.encode(crop).tensor)
        small.append(encoder.encode(half).tensor)
    latents, wanted = torch.cat(large), torch.cat(small)
    halve = load_nano("nano-flux2").get_submodule("net.adapter.halve")
    with torch.inference_mode():
        found = {
            "the mean of four cells": F.avg_pool2d(latents, 2),
            "bilinear, antialiased": F.interpolate(
                latents, scale_factor=0.5, mode="bilinear", antialias=True
            ),
            "nano-flux2's halving": halve(latents),
        }
    rows = {name: explained(value, wanted) for name, value in found.items()}
    lines = ["| map | R² |", "| --- | --- |"]
    lines += [f"| {name} | {value:.3f} |" for name, value in rows.items()]
    print("\n".join(lines))
    (RESULTS / "halving.json").write_text(
        json.dumps({"crops": len(crops), **rows}, indent=1) + "\n"
    )
    (RESULTS / "halving.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
