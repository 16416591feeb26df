"""Who judges the images of a scan: a policy, and a model for each latent space that occurs.

The engine knows no more of it than this; scoring.py judges with torch, onnx.py with an exported
file and without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from latentguard.errors import PolicyError
from latentguard.scan.record import ModelId, PolicyId
from latentguard.scan.summary import ModelInfo
from latentguard.verdict import resolve_threshold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from latentguard.spaces import LatentArray
    from latentguard.verdict import Verdict


class Model(Protocol):
    """A policy bound to one model."""

    @property
    def info(self) -> ModelInfo:
        """Which model it is, and what it cannot do."""

    def verdicts(self, latents: LatentArray) -> list[Verdict]:
        """One for each image; what it raises is an error of these images."""

    def heatmaps(self, latents: LatentArray) -> NDArray[np.float32]:
        """Margins [B, K, h, w]. Raises LatentsError or ModelError where there are none."""


class Judge(ABC):
    """A policy as plain data, and its models.

    models: those that took part so far. notes: sentences for people. loading: seconds that loading
    models took so far.
    """

    def __init__(self, plain: dict[str, Any]) -> None:
        self.plain = plain
        self.policy_id = PolicyId(plain["name"], plain["version"], plain["sha256"])
        self.models: list[ModelInfo] = []
        self.notes: list[str] = []
        self.loading = 0.0

    @abstractmethod
    def model_of(self, space: str) -> Model | str:
        """The model that judges latents of a space, or why none does."""


def describe(
    plain: Mapping[str, Any],
    model: tuple[str, str],
    space: str,
    notes: str,
    unseen: Sequence[tuple[str, ...]],
    logit_scale: float,
    unseen_contrast: Sequence[str] = (),
) -> ModelInfo:
    """A model that judges by a policy.

    unseen: each concept's prompts that it cannot see (`verdict.unseen_prompts`).
    unseen_contrast: the contrast prompts that it cannot see.

    Raises PolicyError for a threshold that this model lacks: every image would be an error.
    """
    limits, uncovered, partly = {}, [], {}
    for concept, hidden in zip(plain["concepts"], unseen, strict=True):
        if len(hidden) == len(concept["prompts"]):
            uncovered.append(concept["id"])
            continue
        if hidden:
            partly[concept["id"]] = hidden
        try:
            limit = resolve_threshold(concept, plain, model, space, logit_scale=logit_scale)
        except ValueError as error:
            raise PolicyError(f"policy '{plain['name']}': {error}") from error
        limits[concept["id"]] = limit
    return ModelInfo(
        ModelId(*model), space, notes, tuple(uncovered), limits, partly, tuple(unseen_contrast)
    )
