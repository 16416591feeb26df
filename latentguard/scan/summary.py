"""The result of a whole scan: counts, time, and the models that judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from latentguard.deprecated import Former, former_keywords
from latentguard.files import PassedOver
from latentguard.judge import ModelId, PolicyId
from latentguard.scan.record import ScanRecord


@former_keywords(limits="thresholds")
@dataclass(frozen=True)
class ModelInfo:
    """A model that took part in a scan, and what it could not do.

    space: the latent space that it reads.
    notes: what its makers say about it, its limits first; may be empty.
    uncovered: ids of the policy's concepts that it cannot see.
    thresholds: concept id -> threshold as a margin, where it is known for this model.
    unseen: concept id -> the prompts that it cannot see, of concepts of which it sees others.
    unseen_contrast: the contrast prompts that it cannot see.
    crop_side: rows or columns of latents above which it could read an image in crops, where neither
        the policy nor the caller says whether it should.
    """

    id: ModelId
    space: str
    notes: str = ""
    uncovered: tuple[str, ...] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    unseen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unseen_contrast: tuple[str, ...] = ()
    crop_side: int | None = None

    limits = Former("thresholds")


@dataclass
class Summary:
    """Counts of a scan, one `add` per image.

    outcomes: allow, review, steer, block or error, each image once. decisions: those of the errors
    too. seconds, passed: set by whoever runs the scan (`Scan.seconds`, `Scan.passed`).
    """

    policy: PolicyId
    outcomes: Counter[str] = field(default_factory=Counter)
    models: Counter[ModelId] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    passed: PassedOver = field(default_factory=PassedOver)

    def add(self, record: ScanRecord) -> None:
        self.outcomes[record.outcome] += 1
        self.decisions[record.verdict.decision] += 1
        if record.judged_by is not None:
            self.models[record.judged_by] += 1

    @property
    def images(self) -> int:
        return self.outcomes.total()

    def counts(self) -> dict[str, int]:
        """Allowed, review, (steer,) blocked and errors, in that order, each image once."""
        names = {"allow": "allowed", "review": "review", "steer": "steer", "block": "blocked"}
        counts = {names[o]: self.outcomes[o] for o in names if o != "steer" or self.outcomes[o]}
        errors = self.outcomes["error"]
        return {**counts, "error" if errors == 1 else "errors": errors}

    def line(self) -> str:
        """One line: how many images, what became of them, how fast, by which model and policy."""
        counts = ", ".join(f"{n:,} {name}" for name, n in self.counts().items())
        noun = "image" if self.images == 1 else "images"
        rate = f"{self.images / self.seconds:,.1f} images/s · " if self.seconds > 0 else ""
        models = ", ".join(f"{m.name} ({m.sha256[:12]})" for m in self.models) or "no model"
        return (
            f"{self.images:,} {noun}: {counts} · {rate}{models} · "
            f"policy {self.policy.name} {self.policy.version} ({self.policy.sha256[:12]})"
        )
