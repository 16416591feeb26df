"""GenEval (Ghosh et al., NeurIPS 2023): whether images show the objects that prompts ask for.

Reading order: prompts.py (evaluation_metadata.jsonl) -> layout.py (the folders that the benchmark's
own evaluator reads) -> rules.py (from detections to right or wrong) -> colors.py and detector.py
(what the built-in evaluator sees) -> measure.py and report.py (figures).

The built-in evaluator is not the official one, which detects with Mask2Former and names colors
with CLIP. Its figures compare with one another, not with published ones.
"""

from __future__ import annotations

from latentguard.evaluate.geneval.layout import asked_of, write_grids, write_metadata
from latentguard.evaluate.geneval.prompts import Prompt, Wanted, read_prompts
from latentguard.evaluate.geneval.rules import Detected, check

__all__ = [
    "Detected",
    "Prompt",
    "Wanted",
    "asked_of",
    "check",
    "read_prompts",
    "write_grids",
    "write_metadata",
]
