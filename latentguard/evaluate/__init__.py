"""Measuring encoders and policies on latents whose content is known.

Reading order: metrics.py (numbers from scores) -> reading.py (latents, every one of them) ->
classes.py, labels.py and templates.py (names, which one an image is of, texts around them) ->
zeroshot.py and detect.py (the two measurements) -> plots.py. The pixel-space ceiling beside them is
measured in benchmarks/.

Benchmarks that generate images first: generate/ (generators, arms, a run's folder) and judges/,
then i2p/, geneval/, t2i_compbench/, bias/ and generated/ (class names, for zero-shot accuracy).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentguard.deprecated import former_names
from latentguard.evaluate.detect import Detection, detect
from latentguard.evaluate.metrics import Interval, Separation, separation
from latentguard.evaluate.zeroshot import ZeroShot, zeroshot

__all__ = [
    "Detection",
    "Interval",
    "Separation",
    "ZeroShot",
    "detect",
    "separation",
    "zeroshot",
]

if not TYPE_CHECKING:
    __getattr__ = former_names(__name__, {"Estimate": "Interval"})
