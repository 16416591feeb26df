"""Verdicts in the words of published hazard schemes, by the mapping that a policy has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from latentguard.judge.categories import Categories
from latentguard.judge.rules import Rule, Rules
from latentguard.judge.verdict import ConceptScore, Verdict, listed


def categorize(verdict: Verdict, rules: Rules, scheme: str, *, every: bool = False) -> Categories:
    """What a verdict says in the categories of a scheme.

    rules: of the policy that the verdict is of.
    every: tell of all categories of the scheme, and not only of those that the policy maps a
        concept to. No score is known of the others.

    A category is flagged where a concept of it matched. Its score is the largest probability of its
    concepts that were judged; None, and never 0, where none was. Its level, where the scheme has
    levels, is the largest of the concepts that matched, by their severities; 0 where none matched.

    Raises ValueError where the policy maps no concept to the scheme.
    """
    found = rules.scheme(scheme)
    concepts = rules.mapped[scheme]
    names = found.categories if every else {key: found.categories[key] for key in concepts}
    scored = {score.id: score for score in verdict.concepts}
    flagged: list[str] = []
    scores: dict[str, float | None] = {}
    unchecked: dict[str, str] = {}
    levels: dict[str, int | None] = {}
    for category in names:
        mapped = concepts.get(category, ())
        judged = [scored[rule.id] for rule in mapped if _judged(scored.get(rule.id))]
        scores[category] = max((score.probability for score in judged), default=None)
        if any(score.matched for score in judged):
            flagged.append(category)
        clause = _unchecked(mapped, scored, verdict) if mapped else _unmapped(rules)
        if clause:
            unchecked[category] = clause
        if found.severities is not None:
            matched = (found.severities[rules[s.id].severity] for s in judged if s.matched)
            levels[category] = max(matched, default=0) if judged else None
    return Categories(
        scheme=scheme,
        version=found.version,
        names=dict(names),
        flagged=tuple(flagged),
        scores=scores,
        unchecked=unchecked,
        severities=None if found.severities is None else levels,
    )


def with_taxonomies(verdict: Verdict, rules: Rules, schemes: Iterable[str]) -> Verdict:
    """The verdict with what it says in each of these schemes. Raises as `categorize` does."""
    found = tuple(categorize(verdict, rules, scheme) for scheme in schemes)
    return replace(verdict, taxonomies=found) if found else verdict


def _judged(score: ConceptScore | None) -> bool:
    return score is not None and score.covered and score.judged


def _all(names: Sequence[str]) -> str:
    return listed(names, len(names))


def _unmapped(rules: Rules) -> str:
    return f"no concept of policy '{rules.policy.name}' is mapped to it"


def _unchecked(mapped: Iterable[Rule], scored: dict[str, ConceptScore], verdict: Verdict) -> str:
    """What of a category's concepts was not checked, and why; empty where all was."""
    model = verdict.model.name if verdict.model else "the model"
    missing: list[str] = []
    hidden: list[str] = []
    waiting: list[str] = []
    partly: list[str] = []
    for rule in mapped:
        score = scored.get(rule.id)
        if score is None:
            missing.append(rule.id)
        elif not score.covered:
            hidden.append(rule.id)
        elif not score.judged:
            waiting.append(rule.id)
        elif score.unseen:
            partly.append(f"{model} cannot see {_all(score.unseen)} of '{rule.id}'")
    clauses = [f"{model} cannot see {_all(hidden)}"] if hidden else []
    if waiting:
        clauses.append(f"{_all(waiting)} not judged at noise level {verdict.noise_level:g}")
    if missing:
        clauses.append(f"{_all(missing)} could not be judged ({verdict.error or 'no score'})")
    return "; ".join(clauses + partly)
