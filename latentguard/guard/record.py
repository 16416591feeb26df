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


Kind = Literal["allowed", "blanked", "blurred", "placeholder", "callback", "raised", "retried"]


@dataclass(frozen=True)
class Attempt:
    """One more generation of an image that was blocked.

    seed: of its generator; None where the pipeline takes none. verdict: on its image; None where
    there is none. error: what kept it from being judged to its end.
    """

    seed: int | None
    verdict: Verdict | None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        verdict = self.verdict
        return {
            "seed": self.seed,
            "decision": None if verdict is None else verdict.decision,
            "reason": None if verdict is None else verdict.reason,
            "error": self.error,
        }


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    kind: `allowed` as it was generated; `retried`: blocked, and the last of `attempts` was allowed;
    `blanked`: black, or zero latents; `blurred`, `placeholder`, `callback`: what took its place;
    `raised`: nothing was returned.
    attempts: those after the first generation. note: why it is not what `on_block` asks for.
    """

    kind: Kind
    attempts: tuple[Attempt, ...] = ()
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "outcome": self.kind,
            "attempts": [attempt.to_dict() for attempt in self.attempts],
            "note": self.note,
        }


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
    attempt: 0, or which of the generations it belongs to that `on_block: retry` made.
    """

    step: int
    noise_level: float
    estimate_source: str
    final: bool
    verdicts: tuple[Verdict | None, ...]
    actions: tuple[Action, ...]
    steering: tuple[Steering | None, ...]
    seconds: float
    attempt: int = 0

    how = Former("estimate_source")

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able data; an infinite noise level is null."""
        return {
            "attempt": self.attempt,
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
    outcomes: what became of each image.
    """

    request_id: str
    verdicts: tuple[Verdict, ...]
    history: tuple[StepRecord, ...]
    outcomes: tuple[Outcome, ...] = ()

    @classmethod
    def of(cls, sessions: Sequence[Session]) -> CallRecord:
        """That of a call with these sessions, one for each guard."""
        by_image = zip(*(session.verdicts for session in sessions), strict=True)
        return cls(
            sessions[0].request_id,
            tuple(max(some, key=lambda v: DECISIONS.index(v.decision)) for some in by_image),
            tuple(record for session in sessions for record in session.history),
            sessions[0].outcomes,
        )


def session_data(
    identity: dict[str, Any],
    verdicts: Sequence[Verdict],
    history: Sequence[StepRecord],
    outcomes: Sequence[Outcome],
) -> dict[str, Any]:
    """A whole session as JSON-able data: who judged, the final verdicts, what became of each image,
    every scored step."""
    return {
        "schema_version": SCHEMA_VERSION,
        **identity,
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        "outcomes": [outcome.to_dict() for outcome in outcomes],
        "history": [record.to_dict() for record in history],
    }
