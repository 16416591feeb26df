"""Verdicts in words."""

from __future__ import annotations

from collections.abc import Sequence

from latentguard import LatentGuardError, Verdict


class BlockedError(LatentGuardError):
    """Raised where a node is to stop the workflow; the message is why."""


def told(verdicts: Sequence[Verdict], rows: Sequence[int] | None = None) -> str:
    """A line for each image, or for those of `rows`, and one below it for each concept that
    matched."""
    lines = []
    for index in range(len(verdicts)) if rows is None else rows:
        verdict = verdicts[index]
        lines.append(f"image {index}: {verdict.reason}")
        lines += [
            f"  {concept.id} ({concept.action}): '{concept.prompt}', {concept.unit} "
            f"{concept.score:.3f}, threshold {concept.threshold_value:.3f}"
            for concept in verdict.matched
        ]
    return "\n".join(lines)


def blocked(verdicts: Sequence[Verdict]) -> list[int]:
    """The indices of the images that are blocked."""
    return [index for index, verdict in enumerate(verdicts) if verdict.decision == "block"]


def stop(verdicts: Sequence[Verdict], rows: Sequence[int]) -> None:
    """Raise BlockedError where there are `rows`: the images that are blocked."""
    if rows:
        raise BlockedError(f"stopped by LatentGuard\n{told(verdicts, rows)}")
