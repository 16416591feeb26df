"""One image's result, as every sink receives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from latentguard.judge.verdict import ACTIONS, SEVERITIES

if TYPE_CHECKING:
    import numpy as np

    from latentguard.judge import ConceptScore, ModelId, PolicyId, Rules, Verdict

_WEIGHT = tuple(ACTIONS)


@dataclass(frozen=True)
class ScanRecord:
    """The verdict on one image of one source.

    source: the file or shard it was read from, as given.
    index: its place in that source, from 0; -1 where the source itself could not be read.
    id: the name that the file gives it, or None. Untrusted text, kept as it is.
    space: the latent space's name, or None where it is not known.
    verdict: decision, reason and scores; `verdict.error` says what could not be read or judged.
    model: None where no model has judged it; of a cascade the second, see `judged_by`.
    size: rows and columns of the latent grid, or None.
    preview: uint8 [rows, columns, 3], the linear RGB view, where `previews=True` asked for it.
    draw: makes it where it was asked for `late`, so that only few are; holds the latents.
    heatmaps: concept id -> float32 [h, w] of margins, where `heatmaps=True` asked for them.
    ranked: the verdict's concepts, the one that decided first (see `rank`).
    """

    source: str
    index: int
    id: str | None
    space: str | None
    verdict: Verdict
    policy: PolicyId
    model: ModelId | None = None
    size: tuple[int, int] | None = None
    preview: np.ndarray | None = field(default=None, repr=False, compare=False)
    heatmaps: dict[str, np.ndarray] | None = field(default=None, repr=False, compare=False)
    ranked: tuple[ConceptScore, ...] = field(default=(), repr=False, compare=False)
    draw: Callable[[], np.ndarray | None] | None = field(default=None, repr=False, compare=False)

    @property
    def outcome(self) -> str:
        """What to count it as: `error` where it could not be read or judged, else the decision."""
        return "error" if self.failed else self.verdict.decision

    @property
    def leading(self) -> ConceptScore | None:
        """The concept that decided or, where none did, the closest to its threshold."""
        return self.ranked[0] if self.ranked and self.ranked[0].covered else None

    @property
    def judged_by(self) -> ModelId | None:
        """Of a cascade's models, the one that the verdict is of."""
        return self.verdict.model or self.model

    @property
    def failed(self) -> bool:
        """Whether the input could not be read or judged."""
        return self.verdict.error is not None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this image: the verdict's fields and where they come from."""
        return {
            "source": self.source,
            "index": self.index,
            "id": self.id,
            "space": self.space,
            **self.verdict.to_dict(),
            "model": self.judged_by.to_dict() if self.judged_by else None,
            "policy": self.policy.to_dict(),
        }


def rank(concepts: Sequence[ConceptScore], rules: Rules) -> list[ConceptScore]:
    """The concepts with the one that decided first, and what the model cannot see last.

    Matched ones come in the order in which a verdict's reason names them: action, severity (of
    the policy), probability. Then the others, the closest to its threshold first.
    """

    def weight(concept: ConceptScore) -> tuple[bool, bool, int, int, float]:
        if concept.matched:
            grave = SEVERITIES.index(rules[concept.id].severity)
            return False, False, -_WEIGHT.index(concept.action), -grave, -concept.probability
        gap = -concept.gap
        return not concept.covered, True, 0, 0, gap if math.isfinite(gap) else math.inf

    return sorted(concepts, key=weight)
