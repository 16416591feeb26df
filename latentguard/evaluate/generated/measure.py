"""From an arm's final latents to accuracies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.encoders import Encoder
from latentguard.evaluate.generate.shares import RESAMPLES, interval_dict, share
from latentguard.evaluate.zeroshot import zeroshot


@dataclass(frozen=True)
class Measured:
    """What an encoder takes an arm's images for.

    classes: [n] the class that each image is of. ranks: [n] the place of that class among all, 0 is
    first. predicted: [n] the first one. A blocked image has -1 in both: it is taken for nothing.
    """

    model: str
    sha256: str
    classes: NDArray[np.int64]
    ranks: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def right(self, k: int) -> list[bool]:
        """Of each image, whether its class is among the first k; of a blocked one it is not."""
        return [bool(hit) for hit in (self.ranks >= 0) & (self.ranks < k)]


def measure_arm(
    latents: Sequence[Path | None],
    classes: Sequence[int],
    names: Sequence[str],
    encoder: Encoder,
    templates: Sequence[str],
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Classify an arm's images among `names`.

    latents: a file each; None where the image was blocked. classes: what each is of.
    Raises as `zeroshot` does.
    """
    shown = [number for number, file in enumerate(latents) if file is not None]
    ranks = np.full(len(latents), -1, np.int64)
    predicted = np.full(len(latents), -1, np.int64)
    if shown:
        found = zeroshot(
            [file for file in latents if file is not None],
            names,
            [classes[number] for number in shown],
            encoder,
            templates=templates,
            batch_size=batch_size,
            progress=progress,
        )
        ranks[shown], predicted[shown] = found.ranks, found.predicted
    return Measured(encoder.name, encoder.sha256, np.asarray(classes), ranks, predicted)


def figures_of(
    found: Measured, names: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """JSON-able: top-1 and top-5 with their intervals, and what became of each class.

    Images of a class are of one prompt, and are drawn together.
    """
    groups = found.classes.tolist()
    right = found.right(1)
    by_class = []
    for number in dict.fromkeys(groups):
        mine = np.flatnonzero(found.classes == number)
        others = Counter(int(other) for other in found.predicted[mine] if other not in (number, -1))
        by_class.append(
            {
                "class": number,
                "name": names[number],
                "top1": round(float(np.mean([right[i] for i in mine])), 6),
                "taken_for": [
                    {"class": other, "name": names[other], "images": count}
                    for other, count in sorted(others.items(), key=lambda o: (-o[1], o[0]))[:3]
                ],
            }
        )
    return {
        "model": {"name": found.model, "sha256": found.sha256},
        "top1": interval_dict(share(right, groups, seed, resamples)),
        "top5": interval_dict(share(found.right(5), groups, seed, resamples)),
        "by_class": by_class,
    }
