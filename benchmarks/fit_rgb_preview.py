"""Fit the linear RGB view of a latent space: latents of pictures, and the pictures.

    python benchmarks/fit_rgb_preview.py LATENTS IMAGES [--space NAME] [--scaled | --unscaled]

LATENTS is anything that `latentguard scan` reads (a file, folder, glob or shard); IMAGES is the
folder of the pictures that were encoded. Pairs are made by id (an image's file name without its
suffix) where the latents have ids, else by order of name. Each picture is averaged down to one
pixel per latent cell, and rgb = z @ F + b is solved by least squares on four fifths of the images;
the other fifth gives R^2 for each color. Prints F and b as they stand in latentguard/spaces.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from latentguard.files import Record, read_latents

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
HOLD_OUT = 5


def pairs(records: Iterator[Record], images: list[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cells [H*W, C] and colors [H*W, 3] in [-1, 1], image by image."""
    by_name = {path.stem: path for path in images}
    for number, record in enumerate(records):
        if record.latents is None:
            raise SystemExit(f"{record.source}, image {record.index}: {record.error}")
        path = by_name.get(record.id) if record.id is not None else images[number]
        if path is None:
            raise SystemExit(f"no picture named {record.id} in the folder")
        tensor = record.latents.tensor[0].float()
        channels, height, width = tensor.shape
        with Image.open(path) as picture:
            if abs(picture.width * height / (picture.height * width) - 1) > 0.02:
                raise SystemExit(
                    f"{path}: {picture.size} is not the shape of {height}x{width} cells"
                )
            small = picture.convert("RGB").resize((width, height), Image.Resampling.BOX)
        cells = tensor.reshape(channels, -1).T.double().numpy()
        yield cells, np.asarray(small, dtype=np.float64).reshape(-1, 3) / 127.5 - 1


class LeastSquares:
    """Normal equations, so that memory does not grow with the number of images."""

    def __init__(self, channels: int) -> None:
        self.xx = np.zeros((channels + 1, channels + 1))
        self.xy = np.zeros((channels + 1, 3))
        self.yy = np.zeros(3)

    def add(self, cells: np.ndarray, colors: np.ndarray) -> None:
        x = np.concatenate([cells, np.ones((len(cells), 1))], axis=1)
        self.xx += x.T @ x
        self.xy += x.T @ colors
        self.yy += (colors**2).sum(0)

    def solve(self) -> np.ndarray:
        return np.linalg.solve(self.xx, self.xy)

    def r_squared(self, solution: np.ndarray) -> np.ndarray:
        """1 - residual / variance of what was added, for each color."""
        residual = (
            self.yy
            - 2 * (solution * self.xy).sum(0)
            + np.einsum("ir,ij,jr->r", solution, self.xx, solution)
        )
        count, total = self.xx[-1, -1], self.xy[-1]
        return 1 - residual / (self.yy - total**2 / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("latents")
    parser.add_argument("images", type=Path)
    parser.add_argument("--space")
    parser.add_argument("--scaled", action="store_const", const=True)
    parser.add_argument("--unscaled", dest="scaled", action="store_const", const=False)
    arguments = parser.parse_args()

    images = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in SUFFIXES)
    records = read_latents([arguments.latents], arguments.space, arguments.scaled)
    fit: LeastSquares | None = None
    check: LeastSquares | None = None
    number = 0
    for number, (cells, colors) in enumerate(pairs(records, images), start=1):
        if fit is None or check is None:
            fit, check = LeastSquares(cells.shape[1]), LeastSquares(cells.shape[1])
        (check if number % HOLD_OUT == 0 else fit).add(cells, colors)
    if fit is None or check is None or number < HOLD_OUT:
        raise SystemExit(f"at least {HOLD_OUT} images are needed, got {number}")

    solution = fit.solve()
    for row in solution[:-1]:
        print("    (" + ", ".join(f"{value:.4f}" for value in row) + "),")
    print("bias (" + ", ".join(f"{value:.4f}" for value in solution[-1]) + ")")
    scores = ", ".join(f"{value:.3f}" for value in check.r_squared(solution.round(4)))
    print(f"R^2 of red, green, blue on the held-out fifth of {number} images: {scores}")


if __name__ == "__main__":
    main()
