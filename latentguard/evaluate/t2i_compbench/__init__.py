"""T2I-CompBench (Huang et al., NeurIPS 2023): its images, in the folder that its evaluators read.

Reading order: prompts.py (its text files, its names of pictures) -> phrases.py and blip.py
(BLIP-VQA, built in) -> report.py. Its other evaluators are the benchmark's own.
"""

from __future__ import annotations

from latentguard.evaluate.t2i_compbench.prompts import asked_of, read_prompts
from latentguard.evaluate.t2i_compbench.report import Scored, report

__all__ = ["Scored", "asked_of", "read_prompts", "report"]
