"""What every judge does: PyTorch's Scorer, the runtime's, and a cascade of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentguard.judge.rules import BoundRules
from latentguard.judge.verdict import Verdict

Batch = TypeVar("Batch", contravariant=True)
"""A batch of latents of the judge's kind: torch's `Latents`, or NumPy's `LatentArray`."""


@dataclass(frozen=True)
class Heatmaps:
    """Where in each image a concept is.

    margins: [B, K, h, w] float32; each cell is scored as if it were the image. None where there are
    none. problem: why there are none; a verdict stands without them.
    """

    margins: NDArray[np.float32] | None = None
    problem: str | None = None

    @classmethod
    def failed(cls, error: Exception) -> Heatmaps:
        """None, and why."""
        return cls(problem=" ".join(str(error).split()) or type(error).__name__)


@dataclass(frozen=True)
class Judged:
    """What a judge makes of a batch.

    verdicts: one for each image. heatmaps: where they were asked for. escalated: of a cascade,
    whether the second judge was asked about each image; None where there is no cascade.
    """

    verdicts: Sequence[Verdict]
    heatmaps: Heatmaps | None = None
    escalated: tuple[bool, ...] | None = None


class Judge(Protocol[Batch]):
    """A policy bound to a model, in whichever runtime."""

    @property
    def bound(self) -> BoundRules:
        """The policy's rules, and the model whose scores they judge."""

    def judge(
        self,
        latents: Batch,
        noise_level: float = 0.0,
        final: bool = True,
        heatmaps: bool = False,
    ) -> Judged:
        """Verdicts on a batch, and heat maps from the same pass through the encoder.

        noise_level: noise-to-signal ratio of the latents, 0 is clean. final: nothing follows them.
        Raises LatentsError for latents of another space. What goes wrong with the heat maps alone
        is told in them, and never costs the verdicts.
        """
