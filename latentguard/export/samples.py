"""Latents that an export is calibrated on and compared with PyTorch on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from latentguard.errors import LatentsError
from latentguard.files import load_latents
from latentguard.spaces import Latents, LatentSpace


def read_samples(paths: Sequence[str | Path], space: str) -> Latents:
    """All latents of some files as one batch. Raises LatentsError where sizes or spaces differ."""
    batches = [load_latents(path, space) for path in paths]
    sizes = sorted({(batch.height, batch.width) for batch in batches})
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise LatentsError(f"latents for an export must be of one size, got {shown}")
    return Latents.cat([batch.to_standard() for batch in batches])


def bundled(space: str) -> Latents | None:
    """Real latents that come with latentguard; None for spaces that it has none of."""
    package = Path(__file__).resolve().parents[1]
    # Installed they lie inside the package, in a checkout beside it.
    for folder in (package / "examples", package.parent / "examples"):
        path = folder / "latents.pt"
        if path.is_file():
            found = load_latents(path)
            return found if found.space.name == space else None
    return None


def drawn(space: str, size: tuple[int, int], count: int = 8) -> Latents:
    """Random scaled latents with a space's statistics, partly smooth, as images are.

    They stand in where there are no real ones: numbers can be compared on them, decisions not.
    """
    known = LatentSpace.get(space)
    generator = torch.Generator().manual_seed(0)
    shape = (count, known.channels, *size)
    fine = torch.randn(shape, generator=generator)
    coarse = torch.nn.functional.interpolate(
        torch.randn((count, known.channels, 4, 4), generator=generator), size, mode="bicubic"
    )
    mixed = 0.6 * fine + 0.8 * coarse
    if known.mean is None or known.std is None:
        return Latents(mixed, known, scaled=True)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (known.mean, known.std))
    return Latents(mixed * std + mean, known, scaled=False).to_scaled()


def resized(latents: Latents, size: tuple[int, int]) -> Latents:
    """Latents averaged or repeated to another size: still of an image, if a blurred one."""
    if (latents.height, latents.width) == size:
        return latents
    spatial = latents.to_spatial()
    tensor = torch.nn.functional.interpolate(
        spatial.tensor.float(), size, mode="bilinear", antialias=True
    )
    return Latents(tensor, spatial.space, spatial.scaled, ids=spatial.ids)
