"""Whether a model is what it should be: clear pictures, their texts, and what must hold of them.

Reading order: cases.py (which pictures, and what they show) -> embedded.py (similarities, in the
right reading of the latents and in wrong ones) -> checks.py (what must hold, and what is wrong
where it does not) -> run.py (all of it).
"""

from __future__ import annotations

from latentguard.evaluate.golden.cases import Case, bundled_cases, picture_cases
from latentguard.evaluate.golden.checks import Check
from latentguard.evaluate.golden.run import Golden, check_model

__all__ = ["Case", "Check", "Golden", "bundled_cases", "check_model", "picture_cases"]
