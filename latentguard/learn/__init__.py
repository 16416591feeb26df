"""Concepts from examples: a linear head on what a model sees of them, in closed form.

Reading order: statistics.py (what is kept of examples, and adds up) -> heads.py (sums to a head)
-> platt.py (scores to log odds) -> duplicates.py and folds.py (cross-validation) -> figures.py
(what it says) -> solved.py (all of a head) -> shipped.py (negatives of the package) ->
examples.py (latents to vectors) -> learning.py, testing.py and merging.py (the three things that
are done) -> files.py. What a file holds stands in latentguard.policy.examples.
"""

from __future__ import annotations

from latentguard.learn.examples import Examples, examples, of_files
from latentguard.learn.figures import Figures
from latentguard.learn.learning import Lesson, learn
from latentguard.learn.merging import merge
from latentguard.learn.testing import Tested, try_out

__all__ = [
    "Examples",
    "Figures",
    "Lesson",
    "Tested",
    "examples",
    "learn",
    "merge",
    "of_files",
    "try_out",
]
