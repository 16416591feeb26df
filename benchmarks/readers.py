"""Every way from a picture to a posterior that the accuracy benchmarks compare.

teacher: the pixel network on the picture itself, the ceiling. nano-flux2: the bundled model on
latents of the given autoencoder. Both share one text side. nano-view: views.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.adapt.progress import Progress
from latentguard.adapt.teacher import load_teacher
from latentguard.encode.autoencoders import load_autoencoder
from latentguard.encoders.nano import embed_logits, load_nano


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def encode(pictures: NDArray[np.uint8], autoencoder: Path, cache: Path) -> Tensor:
    """Latents float16 [B, C, h, w] of pictures, kept in `cache` (a .npy file)."""
    if cache.exists():
        found = np.load(cache, allow_pickle=False)
        if len(found) == len(pictures):
            return torch.from_numpy(found)
    encoder = load_autoencoder(autoencoder)
    parts = []
    with Progress(f"encoding {cache.stem}", len(pictures)) as progress:
        for one in pictures:
            parts.append(encoder.encode(to_tensor(one[None])).tensor.half())
            progress.advance(1)
    latents = torch.cat(parts)
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, latents.numpy())
    return latents


def in_batches(read: Callable[[Tensor], Tensor], inputs: Tensor, title: str) -> Tensor:
    """`read` over batches of 8, embeddings [B, 1008]."""
    parts = []
    with torch.inference_mode(), Progress(title, len(inputs)) as progress:
        for batch in inputs.split(8):
            parts.append(read(batch.float()))
            progress.advance(len(batch))
    return torch.cat(parts)


def teacher(pictures: NDArray[np.uint8]) -> Tensor:
    """The pixel teacher's embeddings of 256 px pictures."""
    net = load_teacher()
    return in_batches(lambda x: embed_logits(net.logits(x)), to_tensor(pictures), "teacher")


def flux2(latents: Tensor) -> Tensor:
    """nano-flux2's embeddings of latents."""
    encoder = load_nano("nano-flux2")
    return in_batches(lambda x: encoder.features(x).pooled, latents, "nano-flux2")
