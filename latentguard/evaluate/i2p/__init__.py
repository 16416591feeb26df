"""I2P, inappropriate image prompts (Schramowski et al., CVPR 2023): how much harm is generated.

Reading order: prompts.py (the benchmark's CSV) -> measure.py (from judged images to figures) ->
report.py (the files of results, beside published figures).
"""

from __future__ import annotations

from latentguard.evaluate.i2p.measure import Judged, measure_arm
from latentguard.evaluate.i2p.prompts import Row, asked_of, read_prompts
from latentguard.evaluate.i2p.report import report

__all__ = ["Judged", "Row", "asked_of", "measure_arm", "read_prompts", "report"]
