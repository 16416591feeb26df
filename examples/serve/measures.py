"""What the service counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from latentguard.runtime import Guard, Verdict

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Measures:
    """The metrics of one service.

    policy, model: their names. sha256: of the file or the model that judges. buckets: of the
    histogram, in seconds.
    """

    def __init__(
        self, policy: str, model: str, sha256: str, buckets: Sequence[float] = _SECONDS
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self.answers = Counter(
            "latentguard_answers",
            "Answers to requests, by HTTP status.",
            ["status"],
            registry=registry,
        )
        self.inside = Gauge(
            "latentguard_requests_inside", "Requests judged or waiting.", registry=registry
        )
        self._images = Counter(
            "latentguard_images", "Images judged, by decision.", ["decision"], registry=registry
        )
        self._matches = Counter(
            "latentguard_matches",
            "Matches of a concept.",
            ["concept", "action"],
            registry=registry,
        )
        self._errors = Counter(
            "latentguard_errors", "Images that could not be judged.", registry=registry
        )
        self._seconds = Histogram(
            "latentguard_seconds",
            "From a request to its verdicts.",
            buckets=buckets,
            registry=registry,
        )
        about = Gauge(
            "latentguard_guard",
            "Always 1: what is served.",
            ["policy", "model", "sha256"],
            registry=registry,
        )
        about.labels(policy, model, sha256).set(1)

    @classmethod
    def of(cls, guard: Guard) -> Self:
        """Those of a service around an exported file."""
        policy = f"{guard.policy['name']} {guard.policy['version']}"
        return cls(policy, guard.model[0], guard.sha256)

    def judged(self, verdicts: Sequence[Verdict], seconds: float) -> None:
        """Count an answer with verdicts."""
        self.answers.labels(200).inc()
        self._seconds.observe(seconds)
        for verdict in verdicts:
            self._images.labels(verdict.decision).inc()
            if verdict.error is not None:
                self._errors.inc()
            for score in verdict.matched:
                self._matches.labels(score.id, score.action).inc()

    def text(self) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
