"""OpenTelemetry metrics, where that package is installed; nothing otherwise.

latentguard.images     images of calls that ended, by decision, policy and model
latentguard.outcomes   the same images, by what became of them (`Outcome.kind`)
latentguard.steps      scored steps
latentguard.matches    matches, by concept and action
latentguard.errors     images that could not be judged
latentguard.seconds    seconds that the guard took at a step (histogram)
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from latentguard.guard.record import StepRecord
from latentguard.guard.sessions import Session


class Metrics:
    """Instruments of the process's meter provider."""

    def __init__(self) -> None:
        self._counted: WeakSet[Session] = WeakSet()
        try:
            from opentelemetry import metrics
        except ImportError:
            self._instruments: dict[str, Any] | None = None
            return
        meter = metrics.get_meter("latentguard")
        self._instruments = {
            "images": meter.create_counter("latentguard.images", unit="{image}"),
            "outcomes": meter.create_counter("latentguard.outcomes", unit="{image}"),
            "steps": meter.create_counter("latentguard.steps", unit="{step}"),
            "matches": meter.create_counter("latentguard.matches", unit="{match}"),
            "errors": meter.create_counter("latentguard.errors", unit="{image}"),
            "seconds": meter.create_histogram("latentguard.seconds", unit="s"),
        }

    def record(self, session: Session, record: StepRecord) -> None:
        """Count one step."""
        if self._instruments is None:
            return
        scorer = session.scorer
        labels = {"policy": scorer.policy.name, "model": scorer.encoder.name}
        self._instruments["steps"].add(1, labels)
        self._instruments["seconds"].record(record.seconds, labels)
        for index, verdict in enumerate(record.verdicts):
            if verdict is None:
                continue
            if verdict.error is not None:
                self._instruments["errors"].add(1, labels)
            for score in verdict.matched:
                match = {**labels, "concept": score.id, "action": record.actions[index]}
                self._instruments["matches"].add(1, match)

    def ended(self, session: Session) -> None:
        """Count the images of a session by what became of them, once a session."""
        if self._instruments is None or session in self._counted:
            return
        self._counted.add(session)
        scorer = session.scorer
        labels = {"policy": scorer.policy.name, "model": scorer.encoder.name}
        for verdict in session.verdicts:
            self._instruments["images"].add(1, {**labels, "decision": verdict.decision})
        for outcome in session.outcomes:
            self._instruments["outcomes"].add(1, {**labels, "outcome": outcome.kind})
