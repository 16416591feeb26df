"""Measuring encoders and policies on latents whose content is known.

Reading order: metrics.py (numbers from scores) -> reading.py (latents, every one of them) ->
zeroshot.py and detect.py (the two measurements) -> plots.py. The pixel-space ceiling beside them is
measured in benchmarks/.
"""

from __future__ import annotations

from latentguard.evaluate.detect import Detection, detect
from latentguard.evaluate.metrics import Estimate, Separation, separation
from latentguard.evaluate.zeroshot import ZeroShot, zeroshot

__all__ = [
    "Detection",
    "Estimate",
    "Separation",
    "ZeroShot",
    "detect",
    "separation",
    "zeroshot",
]
