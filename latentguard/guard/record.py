"""What a session did: one record for each step, and how records become JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from latentguard.judge import SCHEMA_VERSION, Verdict

Action = Literal["none", "steered", "blocked", "already blocked"]


@dataclass(frozen=True)
class Steering:
    """How one image was steered at one step.

    iterations: gradient steps taken. margins: of the concept that gave the reason, before and
    after. reached: whether every steered concept came under its threshold.
    """

    concept: str
    iterations: int
    before: float
    after: float
    reached: bool


@dataclass(frozen=True)
class StepRecord:
    """One step of one session.

    step: counted from 0. noise_level: noise-to-signal ratio of the latents that were judged (of
        those that the x0 prediction was made from, where there is one).
    how: where the judged estimate came from ("latents": they were judged as they are; otherwise
        as `Denoised.how` names it).
    final: whether nothing follows these latents.
    verdicts: one for each image; None for an image that was blocked before.
    actions: one for each image.
    steering: one for each image, None where it was not steered.
    seconds: spent in the guard at this step.
    """

    step: int
    noise_level: float
    how: str
    final: bool
    verdicts: tuple[Verdict | None, ...]
    actions: tuple[Action, ...]
    steering: tuple[Steering | None, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able data; an infinite noise level is null."""
        return {
            "step": self.step,
            "noise_level": self.noise_level if math.isfinite(self.noise_level) else None,
            "how": self.how,
            "final": self.final,
            "seconds": round(self.seconds, 6),
            "images": [
                {
                    "action": action,
                    "steering": None if steering is None else vars(steering),
                    "verdict": None if verdict is None else verdict.to_dict(),
                }
                for verdict, action, steering in zip(
                    self.verdicts, self.actions, self.steering, strict=True
                )
            ],
        }


def session_data(
    identity: dict[str, Any], verdicts: Sequence[Verdict], history: Sequence[StepRecord]
) -> dict[str, Any]:
    """A whole session as JSON-able data: who judged, the final verdicts, every scored step."""
    return {
        "schema_version": SCHEMA_VERSION,
        **identity,
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        "history": [record.to_dict() for record in history],
    }
