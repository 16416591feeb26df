"""A policy as the judge reads it: typed, frozen, and checked once.

`Rules.of` reads what `Policy.to_dict()` gives, which is also what an exported file carries, so that
judging needs neither pydantic nor torch. `Rules.bind` adds the model that the scores come from;
from then on every threshold is a margin that can be looked up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from latentguard.deprecated import Former
from latentguard.judge.model_id import ModelId, PolicyId
from latentguard.judge.scheme import Scheme
from latentguard.judge.verdict import ACTIONS, SCHEMA_VERSION, SEVERITIES, listed

PURE_NOISE = 1e6
"""Noise levels from here on are one: nothing of an image is left, where flow matching begins at
infinity. Locks, which hold finite levels, have it as this one."""
# Schedulers compute noise levels in float32; calibrated ones are written with few digits.
_NOISE_TOLERANCE = 1e-4
_KINDS = ("probability", "margin", "fpr")


@dataclass(frozen=True)
class Threshold:
    """From which score on a concept matches.

    kind: probability, margin, or fpr, whose margin a calibration holds. value: in that unit.
    """

    kind: str
    value: float


@dataclass(frozen=True)
class Steer:
    """How strongly and how often an image is moved away from a concept at one step."""

    strength: float
    iterations: int


@dataclass(frozen=True)
class Rule:
    """What a policy says of one concept.

    noise_window: the noise levels at which it is judged before the end, both included.
    steer: only where the action is steer. taxonomy: its categories in published hazard schemes.
    examples: its own examples' label, which is the last of the prompts; None without examples.
    reach: how far beyond those of prompts its margins can be.
    """

    id: str
    category: str
    description: str
    action: str
    severity: str
    prompts: tuple[str, ...]
    threshold: Threshold
    noise_window: tuple[float, float]
    steer: Steer | None
    taxonomy: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    examples: str | None = None
    reach: float = 0.0

    @classmethod
    def of(cls, concept: Mapping[str, Any]) -> Rule:
        """Read a concept of `Policy.to_dict()`. Raises ValueError where it cannot be judged by."""
        name = str(concept["id"])
        kind, value = concept["threshold"]["kind"], float(concept["threshold"]["value"])
        if kind not in _KINDS or not math.isfinite(value):
            raise ValueError(f"concept '{name}' has no readable threshold: {kind} {value}")
        action, severity = concept["action"], concept.get("severity", "medium")
        if action not in ACTIONS:
            raise ValueError(f"concept '{name}' has no known action: {action}")
        if severity not in SEVERITIES:
            raise ValueError(f"concept '{name}' has no known severity: {severity}")
        learned = concept.get("examples") or {}
        labels = [learned["label"]] if learned else []
        prompts = tuple(str(text) for text in [*concept["prompts"], *labels])
        if not prompts:
            raise ValueError(f"concept '{name}' has no prompts")
        reach = float(learned.get("reach", 0.0))
        if not 0 <= reach < math.inf:
            raise ValueError(f"concept '{name}' has no readable reach: {reach}")
        low, high = concept["noise_window"]
        window = float(low), math.inf if high is None else float(high)
        if math.isnan(window[0]) or math.isnan(window[1]):
            raise ValueError(f"concept '{name}' has no readable noise window: {low} to {high}")
        steer = concept.get("steer")
        return cls(
            id=name,
            category=str(concept["category"]),
            description=str(concept.get("description") or ""),
            action=action,
            severity=severity,
            prompts=prompts,
            threshold=Threshold(kind, value),
            noise_window=window,
            steer=None if steer is None else Steer(float(steer["strength"]), steer["iterations"]),
            taxonomy={
                scheme: tuple(categories)
                for scheme, categories in (concept.get("taxonomy") or {}).items()
            },
            examples=labels[0] if labels else None,
            reach=reach,
        )

    def judged_at(self, noise_level: float) -> bool:
        """Whether a noise level lies in the concept's window."""
        return self.noise_window[0] <= noise_level <= self.noise_window[1]


@dataclass(frozen=True)
class Escalation:
    """A policy's `cascade`: which model judges first, and within which distance from a threshold
    (in margin) it is not sure."""

    first: str
    unsure: float


@dataclass(frozen=True)
class Calibrated:
    """The margins of one concept under one model, as a lock holds them.

    levels: (noise level, {false-positive rate: margin}), sorted by level.
    """

    levels: tuple[tuple[float, Mapping[float, float]], ...]

    def margin(self, rate: float, noise_level: float, asked: str) -> float:
        """The margin of a rate at a noise level.

        At a calibrated level it is that level's; between two, the lower of their margins, so that
        no calibrated level is judged more mildly than it asks for; outside of them there is none,
        because nothing was measured there. Raises ValueError, which begins with `asked`.
        """
        near = self._near(min(noise_level, PURE_NOISE))
        if not near:
            first, last = self.levels[0][0], self.levels[-1][0]
            raise ValueError(
                f"{asked}, which is calibrated for noise levels {first:g} to {last:g}, "
                f"not for {noise_level:g}"
            )
        margins = []
        for level, by_rate in near:
            match = [margin for fpr, margin in by_rate.items() if math.isclose(fpr, rate)]
            if not match:
                known = ", ".join(f"{fpr:g}" for fpr in by_rate)
                raise ValueError(
                    f"{asked}, but at noise level {level:g} only {known} is calibrated"
                )
            margins.append(match[0])
        return min(margins)

    def _near(self, noise_level: float) -> list[tuple[float, Mapping[float, float]]]:
        """The calibrated level that this is, or those directly below and above it, or none."""
        for entry in self.levels:
            if math.isclose(
                entry[0], noise_level, rel_tol=_NOISE_TOLERANCE, abs_tol=_NOISE_TOLERANCE
            ):
                return [entry]
        below = [entry for entry in self.levels if entry[0] < noise_level]
        above = [entry for entry in self.levels if entry[0] > noise_level]
        return [below[-1], above[0]] if below and above else []


_Key = tuple[str, str, str, str]  # model, its SHA-256, space, concept


@dataclass(frozen=True)
class Rules:
    """A whole policy, as the judge reads it.

    description: for people. on_error: the decision on an image that could not be judged.
    uncovered: `warn` where the policy accepts that a model does not see all of its concepts.
    locked: calibrated margins by (model, its SHA-256, space, concept), None without a lock file.
    schemes: the published hazard schemes that a concept is mapped to, by name.
    """

    policy: PolicyId
    description: str
    on_error: str
    uncovered: str
    concepts: tuple[Rule, ...]
    cascade: Escalation | None = None
    locked: Mapping[_Key, Calibrated] | None = None
    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Rules:
        """Read `Policy.to_dict()`.

        Raises ValueError for an unknown schema_version and for whatever cannot be judged by.
        """
        if not isinstance(plain, Mapping):
            raise ValueError(f"policy: must be a mapping, got {type(plain).__name__}")
        version = plain.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ValueError(f"policy: schema_version must be {SCHEMA_VERSION}, got {version!r}")
        try:
            cascade, lock = plain.get("cascade"), plain.get("lock")
            rules = cls(
                policy=PolicyId(str(plain["name"]), str(plain["version"]), str(plain["sha256"])),
                description=str(plain.get("description") or ""),
                on_error=on_error_of(plain),
                uncovered=str(plain.get("uncovered", "error")),
                concepts=tuple(Rule.of(concept) for concept in plain["concepts"]),
                cascade=cascade and Escalation(cascade["first"], float(cascade["unsure"])),
                locked=None if lock is None else _locked(lock["entries"]),
                schemes={
                    name: Scheme.of(name, scheme)
                    for name, scheme in (plain.get("taxonomies") or {}).items()
                },
            )
        except (KeyError, TypeError, AttributeError) as error:
            kind = type(error).__name__
            raise ValueError(f"policy: cannot be read ({kind}: {error})") from error
        if not rules.concepts:
            raise ValueError("policy: has no concepts")
        if len(set(rules.ids)) < len(rules.ids):
            raise ValueError("policy: two concepts have the same id")
        rules._check_taxonomies()
        return rules

    def _check_taxonomies(self) -> None:
        for rule in self.concepts:
            for name, categories in rule.taxonomy.items():
                known = self.schemes[name].categories if name in self.schemes else ()
                if not all(category in known for category in categories):
                    raise ValueError(
                        f"policy: concept '{rule.id}' is mapped to {listed(categories)} of "
                        f"taxonomy '{name}', which is not there"
                    )

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The concepts' ids, in the policy's order."""
        return tuple(rule.id for rule in self.concepts)

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of all concepts, concept after concept."""
        return tuple(prompt for rule in self.concepts for prompt in rule.prompts)

    @cached_property
    def mapped(self) -> Mapping[str, Mapping[str, tuple[Rule, ...]]]:
        """For each scheme the concepts of each category that has some, in the scheme's order.

        A category's concepts are also those of the categories that it holds.
        """
        found: dict[str, dict[str, tuple[Rule, ...]]] = {}
        for name, scheme in self.schemes.items():
            falls = [
                (rule, scheme.all_above(rule.taxonomy.get(name, ()))) for rule in self.concepts
            ]
            under = {c: tuple(r for r, above in falls if c in above) for c in scheme.categories}
            found[name] = {category: rules for category, rules in under.items() if rules}
        return found

    def scheme(self, name: str) -> Scheme:
        """A hazard scheme that a concept is mapped to. Raises ValueError for any other."""
        found = self.schemes.get(name)
        if found is None:
            known = ", ".join(self.schemes) or "none"
            raise ValueError(
                f"policy '{self.policy.name}' maps no concept to the taxonomy '{name}'; those that "
                f"it maps to: {known}"
            )
        return found

    def __getitem__(self, concept: str) -> Rule:
        """A concept by its id."""
        return self.concepts[self.ids.index(concept)]

    def bind(
        self,
        model: ModelId | None = None,
        space: str | None = None,
        logit_scale: float | None = None,
        *,
        covered: Sequence[bool] | None = None,
        seen: Sequence[bool] | None = None,
    ) -> BoundRules:
        """The rules for scores of one model.

        covered: whether the model sees each concept; None is all of them. seen: whether it sees
        each of `prompts`; None is all of the covered concepts'.
        Raises ValueError where it does not see one and the policy does not say `uncovered: warn`,
        or where it sees none.
        """
        unseen = self._unseen(covered, seen)
        pairs = list(zip(self.concepts, unseen, strict=True))
        if any(unseen) and self.uncovered != "warn":
            # Of a concept that is not seen at all the id says enough.
            hidden = [rule.id for rule, prompts in pairs if len(prompts) == len(rule.prompts)]
            parts = [listed(hidden)] if hidden else []
            parts += [
                f"{listed(prompts)} of '{rule.id}'"
                for rule, prompts in pairs
                if 0 < len(prompts) < len(rule.prompts)
            ]
            raise ValueError(
                f"the model does not see {', '.join(parts)}, and the policy says uncovered: error"
            )
        if all(len(prompts) == len(rule.prompts) for rule, prompts in pairs):
            raise ValueError("the model sees none of the policy's concepts")
        identity = None if model is None else ModelId(*model)
        return BoundRules(self, identity, space, logit_scale, unseen)

    def _unseen(
        self, covered: Sequence[bool] | None, seen: Sequence[bool] | None
    ) -> tuple[tuple[str, ...], ...]:
        """Each concept's prompts that a model does not see."""
        count, total = len(self.concepts), len(self.prompts)
        visible = [True] * count if covered is None else [bool(flag) for flag in covered]
        if len(visible) != count:
            raise ValueError(
                f"covered must have one value for each of {count} concepts, got {len(visible)}"
            )
        flags = [True] * total if seen is None else [bool(flag) for flag in seen]
        if len(flags) != total:
            raise ValueError(
                f"seen must have one value for each of {total} prompts, got {len(flags)}"
            )
        each = iter(flags)
        return tuple(
            tuple([prompt for prompt in rule.prompts if not (next(each) and concept)])
            for rule, concept in zip(self.concepts, visible, strict=True)
        )


@dataclass(frozen=True)
class BoundRules:
    """Rules, and the model whose scores are judged by them.

    model, space: where calibrated margins are looked up. logit_scale: turns probabilities into
    margins. unseen: each concept's prompts that the model does not see.
    """

    rules: Rules
    model: ModelId | None
    space: str | None
    logit_scale: float | None
    unseen: tuple[tuple[str, ...], ...]

    @cached_property
    def covered(self) -> tuple[bool, ...]:
        """Whether the model sees any prompt of each concept."""
        pairs = zip(self.rules.concepts, self.unseen, strict=True)
        return tuple(len(unseen) < len(rule.prompts) for rule, unseen in pairs)

    def calibrated(self, k: int, noise_level: float) -> float:
        """The margin of concept k, whose threshold is a false-positive rate.

        Raises ValueError where it was not calibrated.
        """
        rate = self.rules.concepts[k].threshold.value
        return self.calibration(k).margin(rate, noise_level, self._asked(k))

    def calibration(self, k: int) -> Calibrated:
        """The margins of concept k for this model, at every calibrated noise level.

        Raises ValueError where there are none.
        """
        rule, asked = self.rules.concepts[k], self._asked(k)
        if self.rules.locked is None:
            raise ValueError(
                f"{asked}, but the policy has no lock file with calibrated margins: "
                "`latentguard calibrate` makes one"
            )
        if self.model is None or self.space is None:
            raise ValueError(f"{asked}, but the model and latent space of the scores are not given")
        found = self.rules.locked.get((*self.model, self.space, rule.id))
        if found is None:
            raise ValueError(
                f"{asked}, but the lock file has none for model {self.model.name} "
                f"({self.model.sha256[:12]}) on {self.space} latents"
            )
        return found

    def _asked(self, k: int) -> str:
        rule = self.rules.concepts[k]
        return f"concept '{rule.id}' asks for a false-positive rate of {rule.threshold.value:g}"

    def threshold(self, k: int, noise_level: float = 0.0) -> float:
        """The margin from which on concept k matches, whatever its threshold's kind.

        That of a probability p is logit(p) / logit_scale: -inf for 0, inf for 1.
        Raises ValueError where it cannot be known.
        """
        threshold = self.rules.concepts[k].threshold
        if threshold.kind == "margin":
            return threshold.value
        if threshold.kind == "fpr":
            return self.calibrated(k, noise_level)
        scale, p = self.logit_scale, threshold.value
        if scale is None or not scale > 0:
            raise ValueError(f"the margin of a probability needs a logit_scale > 0, got {scale}")
        if not 0 < p < 1:
            return math.inf if p >= 1 else -math.inf
        return math.log(p / (1 - p)) / scale

    limit = Former("threshold")


def on_error_of(plain: Any) -> str:
    """What a policy says of errors; block where it does not say, or cannot be read."""
    try:
        decision = plain["on_error"]
    except Exception:
        return "block"
    return decision if decision in ("block", "review", "allow") else "block"


def _locked(entries: Iterable[Mapping[str, Any]]) -> dict[_Key, Calibrated]:
    levels: dict[_Key, dict[float, dict[float, float]]] = {}
    for entry in entries:
        key = (entry["model"], entry["model_sha256"], entry["space"], entry["concept"])
        margins = {float(item["fpr"]): float(item["margin"]) for item in entry["margins"]}
        if not all(map(math.isfinite, margins.values())):
            raise ValueError(f"the lock of concept '{key[-1]}' holds a margin that is not finite")
        levels.setdefault(key, {})[float(entry["noise_level"])] = margins
    return {key: Calibrated(tuple(sorted(found.items()))) for key, found in levels.items()}
