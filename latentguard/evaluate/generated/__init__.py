"""Zero-shot accuracy on images that a generator makes of class names.

Reading order: prompts.py (what is asked for) -> pipeline.py (final latents of a pipeline) ->
measure.py (latents to figures) -> report.py (the files of the results).
"""

from __future__ import annotations

from latentguard.evaluate.generated.measure import Measured, measure_arm
from latentguard.evaluate.generated.prompts import PROMPT, asked_of
from latentguard.evaluate.generated.report import report

__all__ = ["PROMPT", "Measured", "asked_of", "measure_arm", "report"]
