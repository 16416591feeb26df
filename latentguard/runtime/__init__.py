"""Verdicts in production: ONNX Runtime and NumPy, nothing else.

Reading order: artifact.py (what is in the file, and what is refused) with wire.py -> session.py ->
network.py (scores and verdicts of one file) -> scorer.py (one, or a cascade) -> batching.py.

from latentguard.runtime import Guard

guard = Guard("guard.onnx", sha256="...")
for verdict in guard.scan(latents):
    print(verdict.decision, verdict.reason)
"""

from __future__ import annotations

from latentguard.errors import LatentsError, ModelError
from latentguard.judge import ConceptScore, Judged, Verdict
from latentguard.runtime.batching import Batching, Overloaded
from latentguard.runtime.scorer import Guard

__all__ = [
    "Batching",
    "ConceptScore",
    "Guard",
    "Judged",
    "LatentsError",
    "ModelError",
    "Overloaded",
    "Verdict",
]
