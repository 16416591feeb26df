"""ReNO's evaluation, as Latent-CLIP's paper has it: rewards on latents beside rewards on pixels.

Reading order: prompts.py (which images) -> measure.py (curves and times from records) -> report.py
(results, costs and a plot). The search is generate/reno.py, and its images may be judged by
GenEval's and T2I-CompBench's evaluators.
"""

from __future__ import annotations

from latentguard.evaluate.reno.prompts import asked_of, read_prompts
from latentguard.evaluate.reno.report import report

__all__ = ["asked_of", "read_prompts", "report"]
