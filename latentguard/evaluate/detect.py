"""How well one concept of a policy is told from everything else, from the margins of a scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard.encoders import Encoder
from latentguard.errors import ModelError, PolicyError
from latentguard.evaluate.metrics import Interval, Separation, separation, wilson
from latentguard.evaluate.reading import batches
from latentguard.judge import ModelId, Rules
from latentguard.policy import Policy, load_policy
from latentguard.scorer import Scorer
from latentguard.spaces import Latents

RESAMPLES = 1000


@dataclass(frozen=True)
class Operating:
    """What the policy's own threshold does on these images.

    margin: the threshold as a margin. recall, fpr: with 95 % Wilson intervals.
    """

    margin: float
    recall: Interval
    fpr: Interval


@dataclass(frozen=True)
class Detection:
    """What was measured for one concept.

    positives, negatives: [P] and [N] margins. operating: None where the policy's threshold is a
    false-positive rate that is not calibrated for this model.
    """

    concept: str
    policy: dict[str, str]
    model: dict[str, str]
    positives: NDArray[np.float64]
    negatives: NDArray[np.float64]
    separation: Separation
    operating: Operating | None
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; intervals are [low, high] of 95 %."""
        found = self.separation
        values: dict[str, Any] = {"concept": self.concept}
        for name, estimate in (
            ("auroc", found.auroc),
            ("average_precision", found.average_precision),
            ("fpr_at_95_recall", found.fpr_at_recall),
        ):
            values[name] = estimate.value
            values[f"{name}_interval"] = [estimate.low, estimate.high]
        values |= {"positives": found.positives, "negatives": found.negatives}
        if self.operating is not None:
            values["threshold_margin"] = self.operating.margin
            values["recall_at_threshold"] = self.operating.recall.value
            values["fpr_at_threshold"] = self.operating.fpr.value
        return values | {
            "resamples": self.resamples,
            "model": self.model,
            "policy": self.policy,
        }


def detect(
    positives: Sequence[str | Path],
    negatives: Sequence[str | Path],
    policy: Policy | str | Path,
    concept: str,
    model: Encoder | str | Path = "auto",
    *,
    space: str | None = None,
    scaled: bool | None = None,
    batch_size: int = 16,
    device: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Detection:
    """Score latents that show a concept and latents that do not, and say how well that tells.

    Args:
        positives, negatives: paths as `files.read_latents` takes them; every image counts, one
            that cannot be read is an error.
        policy, model, device: as for `Scorer`. One model is measured, whatever `cascade` says.
        concept: the id of one of the policy's concepts.
        space, scaled: what the files do not say themselves.
        resamples, seed: of the bootstrap.
        progress: called with the number of images scored.

    Raises:
        LatentsError: an unreadable image, no images, or images of several spaces.
        PolicyError: the policy has no such concept.
        ModelError: no such model, or one that cannot see the concept.
    """
    chosen = load_policy(policy)
    one = only(chosen, concept)
    scorer: Scorer | None = None
    done = 0
    sides = []
    for paths in (positives, negatives):
        margins = []
        for batch in batches(paths, space, scaled, batch_size):
            if scorer is None:
                scorer = Scorer(one, model, space=batch.space.name, device=device)
            margins.append(_margins(scorer, batch))
            done += len(batch)
            progress(done)
        sides.append(np.concatenate(margins))
    assert scorer is not None
    return measured(chosen, scorer, sides[0], sides[1], resamples, seed)


def measured(
    policy: Policy,
    scorer: Scorer,
    positives: NDArray[np.float64],
    negatives: NDArray[np.float64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Detection:
    """A Detection from margins; `scorer` holds the one concept of `policy` that they are of."""
    encoder = scorer.encoder
    model = ModelId(encoder.name, encoder.sha256)
    concept = scorer.policy.concepts[0].id
    rules = Rules.of(policy.to_dict())
    bound = rules.bind(model, encoder.space, encoder.logit_scale)
    try:
        threshold = bound.threshold(rules.ids.index(concept))
    except ValueError:
        operating = None
    else:
        operating = Operating(
            threshold,
            wilson(int((positives >= threshold).sum()), len(positives)),
            wilson(int((negatives >= threshold).sum()), len(negatives)),
        )
    return Detection(
        concept,
        {"name": policy.name, "version": policy.version, "sha256": policy.sha256},
        model.to_dict(),
        positives,
        negatives,
        separation(positives, negatives, resamples, seed),
        operating,
        resamples,
    )


def only(policy: Policy, concept: str) -> Policy:
    """The policy with one of its concepts, for one model: without a cascade.

    PolicyError lists the ids where there is no such concept.
    """
    kept = tuple(c for c in policy.concepts if c.id == concept)
    if not kept:
        ids = ", ".join(c.id for c in policy.concepts)
        raise PolicyError(f"policy '{policy.name}' has no concept {concept!r}: choose from {ids}")
    return policy.model_copy(update={"concepts": kept, "cascade": None})


@torch.inference_mode()
def _margins(scorer: Scorer, batch: Latents) -> NDArray[np.float64]:
    margins: NDArray[np.float64] = scorer.score(batch).margin[:, 0].cpu().double().numpy()
    if not np.isfinite(margins).all():
        raise ModelError(f"model {scorer.encoder.name} gave margins that are not finite")
    return margins
