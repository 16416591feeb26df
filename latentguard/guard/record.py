"""What a session did: one record for each step, and how records become JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from latentguard.deprecated import Former, former_keywords
from latentguard.judge import DECISIONS, SCHEMA_VERSION, Verdict

if TYPE_CHECKING:
    from latentguard.guard.sessions import Session

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


@former_keywords(how="estimate_source")
@dataclass(frozen=True)
class StepRecord:
    """One step of one session.

    step: counted from 0. noise_level: noise-to-signal ratio of the latents that were judged (of
        those that the x0 prediction was made from, where there is one).
    estimate_source: where the judged estimate came from ("latents": they were judged as they are;
        otherwise as `Denoised.estimate_source` names it). JSON calls it `how`.
    final: whether nothing follows these latents.
    verdicts: one for each image; None for an image that was blocked before.
    actions: one for each image.
    steering: one for each image, None where it was not steered.
    seconds: spent in the guard at this step.
    """

    step: int
    noise_level: float
    estimate_source: str
    final: bool
    verdicts: tuple[Verdict | None, ...]
    actions: tuple[Action, ...]
    steering: tuple[Steering | None, ...]
    seconds: float

    how = Former("estimate_source")

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able data; an infinite noise level is null."""
        return {
            "step": self.step,
            "noise_level": self.noise_level if math.isfinite(self.noise_level) else None,
            "how": self.estimate_source,
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


@dataclass(frozen=True)
class CallRecord:
    """What was said of one call of a pipeline: plain data that no later call changes.

    request_id: of its session. verdicts: one for each image; with several guards the strictest.
    history: every scored step; with several guards those of one after those of another.
    """

    request_id: str
    verdicts: tuple[Verdict, ...]
    history: tuple[StepRecord, ...]

    @classmethod
    def of(cls, sessions: Sequence[Session]) -> CallRecord:
        """That of a call with these sessions, one for each guard."""
        by_image = zip(*(session.verdicts for session in sessions), strict=True)
        return cls(
            sessions[0].request_id,
            tuple(max(some, key=lambda v: DECISIONS.index(v.decision)) for some in by_image),
            tuple(record for session in sessions for record in session.history),
        )


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
