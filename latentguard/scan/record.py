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

    source: the file or shard that it was read from, as given.
    index: its place in that source, from 0; -1 if the source itself could not be read.
    id: the name that the file gives it, or None. Untrusted text, kept as it is.
    space: the name of the latent space, or None if it is unknown.
    verdict: decision, reason and scores; `verdict.error` says what could not be read or judged.
    policy: the policy under which it was judged.
    model: None if no model has judged it; the second one of a cascade, see `judged_by`.
    size: rows and columns of the latent grid, or None.
    preview: uint8 [rows, columns, 3], the linear RGB view, if `previews=True` asked for it.
    heatmaps: concept id -> float32 [h, w] of margins, if `heatmaps=True` asked for them.
    ranked: the verdict's concepts, the one that decided first (see `rank`).
    draw: with `previews="late"`, a function that makes the preview when it is needed, so that only
        few are made. It keeps the latents in memory.
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
        """What it counts as: `error` if it could not be read or judged, or else the decision."""
        return "error" if self.failed else self.verdict.decision

    @property
    def leading(self) -> ConceptScore | None:
        """The concept that decided or, if none did, the one closest to its threshold."""
        return self.ranked[0] if self.ranked and self.ranked[0].covered else None

    @property
    def judged_by(self) -> ModelId | None:
        """The model that gave the verdict; in a cascade, the one that decided."""
        return self.verdict.model or self.model

    @property
    def failed(self) -> bool:
        """Whether the input could not be read or judged."""
        return self.verdict.error is not None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this image: its source, the verdict's fields, model and policy."""
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
    """The concepts, with the one that decided first and those that the model cannot see last.

    Concepts that matched come in the order in which a verdict's reason names them: by action, by
    the policy's severity, by probability. The others follow, the closest to its threshold first.
    """

    def weight(concept: ConceptScore) -> tuple[bool, bool, int, int, float]:
        if concept.matched:
            grave = SEVERITIES.index(rules[concept.id].severity)
            return False, False, -_WEIGHT.index(concept.action), -grave, -concept.probability
        gap = -concept.gap
        return not concept.covered, True, 0, 0, gap if math.isfinite(gap) else math.inf

    return sorted(concepts, key=weight)
