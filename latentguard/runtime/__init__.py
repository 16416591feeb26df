"""Verdicts in production: ONNX Runtime and NumPy, nothing else.

from latentguard.runtime import Guard

guard = Guard("guard.onnx", sha256="...")
for verdict in guard.scan(latents):
    print(verdict.decision, verdict.reason)
"""

from __future__ import annotations

from latentguard.errors import LatentsError, ModelError
from latentguard.runtime.batching import Batching
from latentguard.runtime.guard import Guard
from latentguard.verdict import ConceptScore, Verdict

__all__ = ["Batching", "ConceptScore", "Guard", "LatentsError", "ModelError", "Verdict"]
