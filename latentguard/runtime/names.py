"""The names by which an exported file, its graph and the runtime know each other."""

from __future__ import annotations

import re

METADATA, DIGEST = "latentguard", "latentguard.digest"
INPUT = "latents"
OUTPUTS = ("probability", "margin", "best_prompt", "embedding")
HEATMAP = "heatmap"

BANK = ("bank.embeddings", "bank.segments", "bank.contrast", "bank.contrast_segments")
"""The four initializers that a policy's prompts are in; see `latentguard.concepts.ConceptBank`."""

STANDARD = ("", "ai.onnx")
"""The two names of the set of standard ONNX operators."""


def plain(name: str) -> bool:
    """Whether `name` is one that a file beside an export may have."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}", name) is not None
