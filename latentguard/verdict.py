"""Scores and a policy to verdicts: what is decided about each image, and why.

NumPy only, and the policy as plain data (`Policy.plain()`), so that the runtime can use it where
neither pydantic nor torch is installed. What cannot be judged with certainty is never allowed by
accident: it gets the decision that the policy's `on_error` names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SCHEMA_VERSION = 1

DECISIONS = ("allow", "review", "steer", "block")
"""From the mildest to the strictest."""

_ACTIONS = {"observe": "allow", "review": "review", "steer": "steer", "block": "block"}
_MODEL = ("name", "sha256")
_SEVERITIES = ("low", "medium", "high", "critical")
# Rounding in half precision may push a cosine, and so a margin, a little past its bound.
_SLACK = 0.01
# Schedulers compute noise levels in float32; calibrated ones are written with few digits.
_NOISE_TOLERANCE = 1e-4
PURE_NOISE = 1e6
"""Noise levels from here on are one: nothing of an image is left, where flow matching begins at
infinity. Locks, which hold finite levels, have it as this one."""


@dataclass(frozen=True)
class ConceptScore:
    """What one concept scored on one image.

    margin: best cosine over the concept's prompts minus best over its contrast prompts.
    probability: sigmoid(logit scale x margin).
    threshold: {"kind", "value"}; with the kind fpr also {"margin"}, the calibrated one in use.
    prompt: the prompt that matched best.
    covered: whether the model can see the concept at all.
    judged: whether this noise level lies in the concept's window.
    matched: covered, judged, and at or above the threshold.
    unseen: the concept's prompts that the model cannot see, so that they were not checked; records
        of former versions do not have it.
    """

    id: str
    category: str
    action: str
    margin: float
    probability: float
    threshold: dict[str, str | float]
    prompt: str
    covered: bool
    judged: bool
    matched: bool
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What is decided about one image.

    decision: allow, review, steer or block. reason: one sentence. error: what kept the image from
    being judged, or None. noise_level: noise-to-signal ratio, 0 is clean, inf where it is infinite
    or unknown (null in JSON). concepts: every concept that could be scored, matched or not.
    model: (name, sha256) of the encoder that scored it, None where none did or none was named.
    """

    schema_version: int
    decision: str
    reason: str
    error: str | None
    noise_level: float
    concepts: tuple[ConceptScore, ...]
    model: tuple[str, str] | None = None

    @property
    def matched(self) -> tuple[ConceptScore, ...]:
        """The concepts that matched, `observe` included."""
        return tuple(concept for concept in self.concepts if concept.matched)

    def at_least(self, decision: str) -> bool:
        """Whether the decision is `decision` or a stricter one."""
        return DECISIONS.index(self.decision) >= DECISIONS.index(decision)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON-able data."""
        data = asdict(self)
        data["noise_level"] = self.noise_level if math.isfinite(self.noise_level) else None
        data["concepts"] = [
            {**concept, "unseen": list(concept["unseen"])} for concept in data["concepts"]
        ]
        data["model"] = None if self.model is None else dict(zip(_MODEL, self.model, strict=True))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_dict` gave; other keys, as in a scan's records, are left alone.

        Raises ValueError for an unknown schema_version and for missing or ill-typed values.
        """
        version = data.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ValueError(f"verdict: schema_version must be {SCHEMA_VERSION}, got {version!r}")
        noise_level = _read(data, "noise_level", float, or_none=True)
        decision = _read(data, "decision", str)
        if decision not in DECISIONS:
            raise ValueError(
                f"verdict: decision must be one of {', '.join(DECISIONS)}, got {decision!r}"
            )
        return cls(
            schema_version=version,
            decision=decision,
            reason=_read(data, "reason", str),
            error=_read(data, "error", str, or_none=True),
            noise_level=math.inf if noise_level is None else noise_level,
            concepts=tuple(_read_concept(item) for item in _read(data, "concepts", list)),
            model=_read_model(data),
        )


def _read(data: Mapping[str, Any], key: str, kind: type, *, or_none: bool = False) -> Any:
    if key not in data:
        raise ValueError(f"verdict: {key} is missing")
    value = data[key]
    if or_none and value is None:
        return None
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is float or not isinstance(value, kind):
        raise ValueError(f"verdict: {key} must be of type {kind.__name__}, got {value!r}")
    return value


def _read_model(data: Mapping[str, Any]) -> tuple[str, str] | None:
    item = data.get("model")
    if item is None:
        return None
    if isinstance(item, Mapping):
        return _read(item, "name", str), _read(item, "sha256", str)
    return _read(data, "model", str), _read(data, "model_sha256", str)  # as in audit logs


def _read_concept(item: Any) -> ConceptScore:
    if not isinstance(item, Mapping):
        raise ValueError(f"verdict: concepts must hold mappings, got {item!r}")
    threshold = _read(item, "threshold", dict)
    limits = {"kind": _read(threshold, "kind", str), "value": _read(threshold, "value", float)}
    if "margin" in threshold:
        limits["margin"] = _read(threshold, "margin", float)
    return ConceptScore(
        id=_read(item, "id", str),
        category=_read(item, "category", str),
        action=_read(item, "action", str),
        margin=_read(item, "margin", float),
        probability=_read(item, "probability", float),
        threshold=limits,
        prompt=_read(item, "prompt", str),
        covered=_read(item, "covered", bool),
        judged=_read(item, "judged", bool),
        matched=_read(item, "matched", bool),
        unseen=_read_unseen(item),
    )


def _read_unseen(item: Mapping[str, Any]) -> tuple[str, ...]:
    prompts = item.get("unseen", ())
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"verdict: unseen must be a list of prompts, got {prompts!r}")
    return tuple(prompts)


def decide(
    probability: ArrayLike,
    margin: ArrayLike,
    best_prompt: ArrayLike,
    *,
    policy: Mapping[str, Any],
    prompts: Sequence[str],
    covered: Sequence[bool] | None = None,
    seen: Sequence[bool] | None = None,
    noise_level: float = 0.0,
    final: bool = True,
    model: tuple[str, str] | None = None,
    space: str | None = None,
) -> list[Verdict]:
    """One verdict for each image of a batch.

    probability, margin: [B, K] real, a column for each concept of the policy, in its order.
    best_prompt: [B, K] integer, the index into `prompts` of the concept's best prompt.
    policy: `Policy.plain()`.
    prompts: the prompts of all concepts, concept after concept.
    covered: whether the model sees each concept, [K]; None is all of them.
    seen: whether the model sees each of `prompts`, [P]; None is all of the covered concepts'.
    noise_level: noise-to-signal ratio of the latents, 0 is clean, inf is pure noise.
    final: nothing follows these latents (a file, or the end of a generation): every concept is
        judged, whatever its noise window, and a match of `steer` blocks.
    model: (name, sha256) and `space` of the scores, by which thresholds of kind fpr are looked up.

    Never raises and never lets pass what it cannot read: NaN, infinite or impossible scores, wrong
    shapes, an unknown policy version or a missing calibration give a verdict with `error` and the
    decision of the policy's `on_error` (block, unless it says otherwise), or a stricter one where
    the concepts that could be read call for it. Where even the number of images cannot be read
    there is one verdict.
    """
    count = 1
    try:
        count = max(1, *(_rows(array) for array in (probability, margin, best_prompt)))
        p, m, best = _arrays(probability, margin, best_prompt)
        judge = _Judge(policy, prompts, covered, seen, float(noise_level), final, model, space)
        judge.check_shapes(p, m, best)
        return [judge.verdict(p[i], m[i], best[i]) for i in range(len(p))]
    # Fail closed: whatever went wrong, the images have not been judged.
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        verdict = failed(f"{kind}{error}", policy, noise_level)
        return [verdict] * count


def unseen_prompts(
    policy: Mapping[str, Any],
    covered: Sequence[bool] | None = None,
    seen: Sequence[bool] | None = None,
) -> list[tuple[str, ...]]:
    """The prompts of each concept that a model does not see; arguments as of `decide`.

    Raises ValueError where `covered` or `seen` do not fit the policy.
    """
    owned = [[str(prompt) for prompt in concept["prompts"]] for concept in policy["concepts"]]
    visible = [True] * len(owned) if covered is None else [bool(flag) for flag in covered]
    if len(visible) != len(owned):
        raise ValueError(
            f"covered must have one value for each of {len(owned)} concepts, got {len(visible)}"
        )
    total = sum(map(len, owned))
    flags = [True] * total if seen is None else [bool(flag) for flag in seen]
    if len(flags) != total:
        raise ValueError(f"seen must have one value for each of {total} prompts, got {len(flags)}")
    each = iter(flags)
    return [
        tuple([prompt for prompt in prompts if not (next(each) and concept)])
        for prompts, concept in zip(owned, visible, strict=True)
    ]


def failed(error: str, policy: Mapping[str, Any], noise_level: float = 0.0) -> Verdict:
    """The verdict on an image that could not be judged: what `on_error` says, else block."""
    decision = _on_error(policy)
    error = " ".join(error.split()) or "an error without a message"
    return Verdict(
        schema_version=SCHEMA_VERSION,
        decision=decision,
        reason=_error_reason(decision, error),
        error=error,
        noise_level=_level(noise_level),
        concepts=(),
    )


def resolve_threshold(
    concept: Mapping[str, Any],
    policy: Mapping[str, Any],
    model: tuple[str, str] | None = None,
    space: str | None = None,
    noise_level: float = 0.0,
    *,
    logit_scale: float | None = None,
) -> float:
    """The margin from which on `concept` matches.

    concept, policy: plain data, as in `Policy.plain()`.
    model: (name, sha256) and `space` of the encoder, `noise_level` of the latents: where the
        margin of a false-positive rate is looked up in policy["lock"].
    logit_scale: of the encoder, needed for a probability p, whose margin is logit(p) / logit_scale
        (-inf for 0, inf for 1).

    A lock has margins for some noise levels. At one of them its margin is used; between two, the
    lower of their margins, so that no calibrated level is judged more mildly than it asks for;
    outside of them there is none, because nothing was measured there. Levels from PURE_NOISE on,
    infinity among them, are that one.
    Raises ValueError where the margin cannot be known.
    """
    kind, value = concept["threshold"]["kind"], float(concept["threshold"]["value"])
    if kind == "margin":
        return value
    if kind == "fpr":
        return _calibrated(concept["id"], value, policy, model, space, noise_level)
    if kind != "probability":
        raise ValueError(f"concept '{concept['id']}' has a threshold of unknown kind {kind!r}")
    if logit_scale is None or not logit_scale > 0:
        raise ValueError(f"the margin of a probability needs a logit_scale > 0, got {logit_scale}")
    if not 0 < value < 1:
        return math.inf if value >= 1 else -math.inf
    return math.log(value / (1 - value)) / logit_scale


def _calibrated(
    concept: str,
    rate: float,
    policy: Mapping[str, Any],
    model: tuple[str, str] | None,
    space: str | None,
    noise_level: float,
) -> float:
    asked = f"concept '{concept}' asks for a false-positive rate of {rate:g}"
    lock = policy.get("lock")
    if lock is None:
        raise ValueError(f"{asked}, but the policy has no lock file with calibrated margins")
    if model is None or space is None:
        raise ValueError(f"{asked}, but the model and latent space of the scores are not given")
    levels = {
        entry["noise_level"]: entry["margins"]
        for entry in lock["entries"]
        if (entry["model"], entry["model_sha256"], entry["space"], entry["concept"])
        == (*model, space, concept)
    }
    if not levels:
        raise ValueError(
            f"{asked}, but the lock file has none for model {model[0]} ({model[1][:12]}) "
            f"on {space} latents"
        )
    near = _neighbours(sorted(levels), min(noise_level, PURE_NOISE))
    if not near:
        raise ValueError(
            f"{asked}, which is calibrated for noise levels {min(levels):g} to {max(levels):g}, "
            f"not for {noise_level:g}"
        )
    margins = []
    for level in near:
        by_rate = {item["fpr"]: item["margin"] for item in levels[level]}
        match = [margin for fpr, margin in by_rate.items() if math.isclose(fpr, rate)]
        if not match:
            known = ", ".join(f"{fpr:g}" for fpr in by_rate)
            raise ValueError(f"{asked}, but at noise level {level:g} only {known} is calibrated")
        margins.append(float(match[0]))
    return min(margins)


def _neighbours(levels: Sequence[float], noise_level: float) -> list[float]:
    """The calibrated level that this is, or those directly below and above it, or none."""
    for level in levels:
        if math.isclose(level, noise_level, rel_tol=_NOISE_TOLERANCE, abs_tol=_NOISE_TOLERANCE):
            return [level]
    below = [level for level in levels if level < noise_level]
    above = [level for level in levels if level > noise_level]
    return [below[-1], above[0]] if below and above else []


def _rows(array: ArrayLike) -> int:
    """The length of the first dimension, 1 where there is none to be read."""
    try:
        return len(array)  # type: ignore[arg-type]
    except TypeError:
        return 1


def _arrays(
    probability: ArrayLike, margin: ArrayLike, best_prompt: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    arrays = []
    for name, given in (("probability", probability), ("margin", margin)):
        array = np.asarray(given)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"scores: {name} must hold real numbers, got {array.dtype}")
        arrays.append(array.astype(np.float64))
    best = np.asarray(best_prompt)
    if best.dtype.kind not in "iu":
        raise ValueError(f"scores: best_prompt must hold integers, got {best.dtype}")
    return arrays[0], arrays[1], best.astype(np.int64)


@dataclass
class _Judge:
    """The policy, made ready for one batch."""

    policy: Mapping[str, Any]
    prompts: Sequence[str]
    covered: Sequence[bool] | None
    seen: Sequence[bool] | None
    noise_level: float
    final: bool
    model: tuple[str, str] | None
    space: str | None

    def __post_init__(self) -> None:
        version = self.policy["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ValueError(f"policy: schema_version must be {SCHEMA_VERSION}, got {version!r}")
        if not self.noise_level >= 0:
            raise ValueError(f"noise_level must be at or above 0, got {self.noise_level}")
        self.concepts: list[Mapping[str, Any]] = list(self.policy["concepts"])
        ends = np.cumsum([len(concept["prompts"]) for concept in self.concepts])
        if not self.concepts or ends[-1] != len(self.prompts):
            raise ValueError(
                f"prompts must be those of the policy's {len(self.concepts)} concepts, "
                f"{int(ends[-1]) if self.concepts else 0} in all, got {len(self.prompts)}"
            )
        self.ends = ends
        self.begins = ends - [len(concept["prompts"]) for concept in self.concepts]
        self.unseen = unseen_prompts(self.policy, self.covered, self.seen)
        self.visible = self._visible()
        self.judged = [self.final or self._in_window(concept) for concept in self.concepts]
        self.thresholds: list[dict[str, str | float]] = []
        self.errors: list[str] = []
        for concept, visible, judged in zip(self.concepts, self.visible, self.judged, strict=True):
            self.thresholds.append(self._threshold(concept, needed=visible and judged))

    def _visible(self) -> list[bool]:
        pairs = list(zip(self.concepts, self.unseen, strict=True))
        visible = [len(unseen) < len(concept["prompts"]) for concept, unseen in pairs]
        if not any(visible):
            raise ValueError("the model sees none of the policy's concepts")
        if any(self.unseen) and self.policy.get("uncovered") != "warn":
            # Of a concept that is not seen at all the id says enough.
            hidden = [c["id"] for c, sees in zip(self.concepts, visible, strict=True) if not sees]
            parts = [_listed(hidden)] if hidden else []
            parts += [
                f"{_listed(unseen)} of '{concept['id']}'"
                for (concept, unseen), sees in zip(pairs, visible, strict=True)
                if unseen and sees
            ]
            raise ValueError(
                f"the model does not see {', '.join(parts)}, and the policy says uncovered: error"
            )
        return visible

    def _in_window(self, concept: Mapping[str, Any]) -> bool:
        low, high = concept["noise_window"]
        return bool(low <= self.noise_level and (high is None or self.noise_level <= high))

    def _threshold(self, concept: Mapping[str, Any], needed: bool) -> dict[str, str | float]:
        kind, value = concept["threshold"]["kind"], float(concept["threshold"]["value"])
        threshold: dict[str, str | float] = {"kind": str(kind), "value": value}
        if kind not in ("probability", "margin", "fpr") or not math.isfinite(value):
            raise ValueError(f"concept '{concept['id']}' has no readable threshold: {threshold}")
        if concept["action"] not in _ACTIONS:
            raise ValueError(f"concept '{concept['id']}' has no known action: {concept['action']}")
        if kind == "fpr" and needed:
            try:
                threshold["margin"] = resolve_threshold(
                    concept, self.policy, self.model, self.space, self.noise_level
                )
            except ValueError as error:
                self.errors.append(str(error))
        return threshold

    def check_shapes(
        self, p: NDArray[np.float64], m: NDArray[np.float64], best: NDArray[np.int64]
    ) -> None:
        for name, array in (("probability", p), ("margin", m), ("best_prompt", best)):
            if array.ndim != 2 or array.shape[1] != len(self.concepts) or len(array) != len(p):
                raise ValueError(
                    f"scores: {name} must be [images, {len(self.concepts)} concepts] "
                    f"like the others, got {list(array.shape)}"
                )

    def verdict(
        self, p: NDArray[np.float64], m: NDArray[np.float64], best: NDArray[np.int64]
    ) -> Verdict:
        errors = list(self.errors)
        scores: list[ConceptScore] = []
        severities: dict[str, int] = {}
        for k, concept in enumerate(self.concepts):
            problem = self._unreadable(k, p[k], m[k], best[k])
            if problem:
                errors.append(problem)
                continue
            severities[concept["id"]] = _SEVERITIES.index(concept.get("severity", "medium"))
            scores.append(self._score(k, float(p[k]), float(m[k]), int(best[k])))
        matched = sorted(
            (score for score in scores if score.matched),
            key=lambda s: (DECISIONS.index(self._decision(s)), severities[s.id], s.probability),
            reverse=True,
        )
        decision = self._decision(matched[0]) if matched else "allow"
        error = "; ".join(errors) or None
        on_error = _on_error(self.policy)
        enough = decision != "allow" and DECISIONS.index(decision) >= DECISIONS.index(on_error)
        if error is not None and not enough:
            decision = on_error
            reason = _error_reason(decision, error)
        else:
            reason = self._reason(decision, matched, scores)
        return Verdict(
            schema_version=SCHEMA_VERSION,
            decision=decision,
            reason=reason,
            error=error,
            noise_level=self.noise_level,
            concepts=tuple(scores),
            model=self.model,
        )

    def _unreadable(self, k: int, p: float, m: float, best: int) -> str | None:
        name = self.concepts[k]["id"]
        if not (math.isfinite(p) and math.isfinite(m)):
            return f"the score of concept '{name}' is not finite (probability {p}, margin {m})"
        if not (0 <= p <= 1 and abs(m) <= 2 + _SLACK):
            return f"the score of concept '{name}' is impossible (probability {p}, margin {m})"
        if not self.begins[k] <= best < self.ends[k]:
            return f"the best prompt of concept '{name}' has index {best}, which is not one of its"
        return None

    def _score(self, k: int, p: float, m: float, best: int) -> ConceptScore:
        concept, threshold = self.concepts[k], self.thresholds[k]
        judged, covered = self.judged[k], self.visible[k]
        gap = _gap(threshold, p, m)
        return ConceptScore(
            id=str(concept["id"]),
            category=str(concept["category"]),
            action=str(concept["action"]),
            margin=m,
            probability=p,
            threshold=dict(threshold),
            prompt=str(self.prompts[best]),
            covered=covered,
            judged=judged,
            matched=judged and covered and gap is not None and gap >= 0,
            unseen=self.unseen[k],
        )

    def _decision(self, score: ConceptScore) -> str:
        decision = _ACTIONS[score.action]
        return "block" if decision == "steer" and self.final else decision

    def _reason(
        self, decision: str, matched: Sequence[ConceptScore], scores: Sequence[ConceptScore]
    ) -> str:
        if decision != "allow":
            first = matched[0]
            late = first.action == "steer" and decision == "block"
            sentence = f"{decision}: {_match(first)}" + (
                ", and it is too late to steer" if late else ""
            )
            others = [score.id for score in matched[1:] if score.action != "observe"]
            return sentence + (f"; also matched: {_listed(others)}" if others else "")
        parts = [self._closest(scores)]
        if matched:
            parts.append(f"observed only: {_match(matched[0])}")
            if len(matched) > 1:
                parts[-1] += f" and {_listed([score.id for score in matched[1:]])}"
        hidden = self.visible.count(False)
        if hidden:
            noun = "concept is" if hidden == 1 else "concepts are"
            parts.append(f"{hidden} {noun} not visible to this model")
        partly = [score for score in scores if score.covered and score.unseen]
        parts += [f"prompts not checked of '{s.id}': {_listed(s.unseen)}" for s in partly[:3]]
        if len(partly) > 3:
            parts.append(f"prompts not checked of {len(partly) - 3} more concepts")
        return "allow: " + "; ".join(parts)

    def _closest(self, scores: Sequence[ConceptScore]) -> str:
        """The concept with the smallest gap to its threshold, in the threshold's own unit."""
        gaps = [
            (-gap, score)
            for score in scores
            if score.covered and score.judged and not score.matched
            for gap in [_gap(score.threshold, score.probability, score.margin)]
            if gap is not None
        ]
        if not gaps:
            if any(score.matched for score in scores):
                return "nothing that calls for an action matched"
            return f"no concept is judged at noise level {self.noise_level:g}"
        gap, score = min(gaps, key=lambda pair: pair[0])
        unit, value, limit = _compared(score)
        return (
            f"closest is concept '{score.id}' by '{score.prompt}' with {unit} {_figure(value)}, "
            f"{_figure(gap)} under its threshold of {_figure(limit)}"
        )


def _gap(threshold: Mapping[str, str | float], p: float, m: float) -> float | None:
    """How far a score is above its threshold; None where the threshold is not known."""
    if threshold["kind"] == "probability":
        return p - float(threshold["value"])
    limit = threshold["value"] if threshold["kind"] == "margin" else threshold.get("margin")
    return None if limit is None else m - float(limit)


def _compared(score: ConceptScore) -> tuple[str, float, float]:
    """Which of the two scores is compared, its value, and what it is compared with."""
    if score.threshold["kind"] == "probability":
        return "probability", score.probability, float(score.threshold["value"])
    return "margin", score.margin, float(score.threshold.get("margin", score.threshold["value"]))


def _match(score: ConceptScore) -> str:
    unit, value, limit = _compared(score)
    rate = (
        f" for a false-positive rate of {score.threshold['value']:g}"
        if score.threshold["kind"] == "fpr"
        else ""
    )
    return (
        f"concept '{score.id}' matched '{score.prompt}' with {unit} {_figure(value)}, "
        f"threshold {_figure(limit)}{rate}"
    )


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _listed(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _error_reason(decision: str, error: str) -> str:
    return f"{decision}: this could not be judged, {error}"


def _on_error(policy: Mapping[str, Any]) -> str:
    """What the policy says of errors; block where it does not say, or cannot be read."""
    try:
        decision = policy["on_error"]
    except Exception:
        return "block"
    return decision if decision in ("block", "review", "allow") else "block"


def _level(noise_level: Any) -> float:
    """A noise level for the record: inf where it cannot be read."""
    try:
        level = float(noise_level)
    except Exception:
        return math.inf
    return level if level >= 0 else math.inf
