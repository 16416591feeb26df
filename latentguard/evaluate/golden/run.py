"""A model checked on clear pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentguard.encoders import Encoder
from latentguard.evaluate.golden.cases import Case
from latentguard.evaluate.golden.checks import Check, every_check
from latentguard.evaluate.golden.embedded import Asked, Embedded, Similar, asked_of
from latentguard.spaces import Latents


@dataclass(frozen=True)
class Golden:
    """What was found. checks: the first alone, where embeddings are not finite."""

    encoder: Encoder
    asked: Asked
    checks: tuple[Check, ...]
    similar: Similar

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(check.passed is False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the model, each check, each picture."""
        return {
            "schema_version": 1,
            "model": self.encoder.name,
            "sha256": self.encoder.sha256,
            "space": self.encoder.space,
            "needs_scaled": self.encoder.needs_scaled,
            "passed": self.passed,
            "checks": [check.to_dict() for check in self.checks],
            "pictures": self._pictures(),
            "left_out": list(self.asked.left_out),
        }

    def _pictures(self) -> list[dict[str, Any]]:
        texts = self.asked.texts
        if not np.isfinite(self.similar.cosines).all():
            return [{"id": case.id} for case in self.asked.cases]
        rows = zip(
            self.asked.cases,
            self.asked.right,
            self.similar.cosines.argmax(1),
            self.similar.margins,
            strict=True,
        )
        return [
            {
                "id": case.id,
                "text": texts[right],
                "best": texts[best],
                "margin": round(float(margin), 4),
            }
            for case, right, best, margin in rows
        ]


def check_model(encoder: Encoder, latents: Latents, cases: Sequence[Case | None]) -> Golden:
    """Check a model on latents of clear pictures.

    Args:
        latents: a batch of the model's space. cases: what each image shows; None to leave it out.

    Raises:
        LatentsError: latents of another space.
        ModelError: the model has texts for too few of the pictures.
    """
    asked = asked_of(encoder, cases)
    embedded = Embedded(encoder, latents, asked)
    return Golden(encoder, asked, tuple(every_check(embedded)), embedded.similar)
