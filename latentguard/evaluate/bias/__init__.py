"""Whether a guard treats people alike: the same scenes, asked for with different people.

Reading order: prompts.py (scenes and groups) -> measure.py (rates and gaps) -> report.py.
"""

from __future__ import annotations

from latentguard.evaluate.bias.measure import Treated, measure_arm
from latentguard.evaluate.bias.prompts import SHIPPED, Scenes, asked_of, cells_of, read_scenes
from latentguard.evaluate.bias.report import report

__all__ = [
    "SHIPPED",
    "Scenes",
    "Treated",
    "asked_of",
    "cells_of",
    "measure_arm",
    "read_scenes",
    "report",
]
