"""One image that a benchmark asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Asked:
    """One image that a benchmark asks for.

    file: where its picture goes, seen from the arm's folder, without a suffix.
    row: of the benchmark's prompts, from 0. index: among the images of that prompt, from 0.
    seed: of its noise. guidance, height, width: None is the generator's own.
    """

    file: str
    row: int
    index: int
    prompt: str
    seed: int
    guidance: float | None = None
    height: int | None = None
    width: int | None = None


def digest(asked: Sequence[Asked]) -> str:
    """Hex digest of a list of images: of prompts, seeds, guidance and sizes, in their order."""
    lines = (json.dumps(asdict(one), sort_keys=True) for one in asked)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
