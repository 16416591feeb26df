"""The judge: scores and rules to verdicts. NumPy alone; every runtime uses it, Triton's copy too.

Reading order: model_id.py (who) -> verdict.py (what is said) -> rules.py (a policy, made ready)
-> decide.py (scores to verdicts) -> protocol.py and cascade.py (judges, and two of them).
taxonomy.py says verdicts in the words of published hazard schemes (scheme.py, categories.py).
"""

from __future__ import annotations

from latentguard.judge.cascade import CascadeJudge
from latentguard.judge.categories import Categories
from latentguard.judge.decide import decide, failed
from latentguard.judge.model_id import ModelId, PolicyId
from latentguard.judge.protocol import Heatmaps, Judge, Judged
from latentguard.judge.rules import PURE_NOISE, BoundRules, Rule, Rules
from latentguard.judge.scheme import Scheme
from latentguard.judge.taxonomy import categorize, with_taxonomies
from latentguard.judge.verdict import DECISIONS, SCHEMA_VERSION, ConceptScore, Verdict

__all__ = [
    "DECISIONS",
    "PURE_NOISE",
    "SCHEMA_VERSION",
    "BoundRules",
    "CascadeJudge",
    "Categories",
    "ConceptScore",
    "Heatmaps",
    "Judge",
    "Judged",
    "ModelId",
    "PolicyId",
    "Rule",
    "Rules",
    "Scheme",
    "Verdict",
    "categorize",
    "decide",
    "failed",
    "with_taxonomies",
]
