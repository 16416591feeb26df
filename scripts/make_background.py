"""Makes a background of `latentguard concept learn`: what a model sees of everyday photos.

    python scripts/make_background.py latents.safetensors --model nano-flux2 --space flux2

Latents with ids, such as benchmarks/caltech.py writes. They must be of no photo that anything is
measured on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from latentguard.encoders import load_encoder, needs_space
from latentguard.files import Reading
from latentguard.learn import examples, of_files
from latentguard.learn.shipped import FOLDER, save_background

ABOUT = (
    "photos of Caltech-101 (Li, Andreeto, Ranzato and Perona 2022, CC BY 4.0), of the four fifths "
    "that the bundled models may be trained on, encoded by TAEF2 (FLUX.2's tiny autoencoder)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("latents", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--space", required=True)
    parser.add_argument("--about", default=ABOUT)
    parser.add_argument("--to", type=Path, default=FOLDER)
    a = parser.parse_args()
    encoder = load_encoder(a.model, "cpu", a.space if needs_space(a.model) else None)
    found = examples(of_files(a.latents, Reading.of()), encoder, "photos")
    path = a.to / f"{encoder.name}-{encoder.space}.safetensors"
    about = f"{len(found)} {a.about}"
    save_background(path, encoder, found.rows, found.joint, list(found.names), about)
    print(f"{path}: {len(found)} photos, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
