"""A picture of a session: how each concept's score moved toward its threshold while denoising."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from latentguard.errors import LatentsError, ModelError
from latentguard.guard.record import StepRecord
from latentguard.guard.sessions import Session
from latentguard.judge import ConceptScore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 6


def plot(session: Session) -> Figure:
    """Probability over noise level, one panel a concept that came close, one line an image.

    The noise level runs from left (an infinite one is at the edge) to right (clean); the dashed
    line is the threshold, as a probability, where the concept is judged; a cross marks a match for
    which an image was blocked, a triangle one for which it was steered. An image that was generated
    anew has the line of its last generation.
    Raises LatentsError where no step was scored, ModelError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModelError("plots need matplotlib: pip install 'latentguard[eval]'") from error
    history = session.history
    concepts = _closest(session)
    if not concepts:
        raise LatentsError("no step of this session has scores that could be plotted")
    figure = Figure(figsize=(7, 0.6 + 2.1 * len(concepts)), layout="constrained")
    panels = figure.subplots(len(concepts), 1, sharex=True, squeeze=False)[:, 0]
    for panel, concept in zip(panels, concepts, strict=True):
        for image in range(len(history[0].verdicts)):
            _line(panel, session, concept, image)
        panel.set_ylim(-0.03, 1.03)
        panel.set_ylabel("probability")
        panel.set_title(concept, loc="left", fontsize=10)
        panel.grid(alpha=0.25)
    scale = panels[-1]
    scale.set_xscale("symlog", linthresh=0.2)
    # From noise to clean, with room for the marks at both ends.
    scale.set_xlim(1.15 * max(0.2, *(_level(record, session) for record in history)), -0.02)
    scale.set_xlabel("noise level (noise-to-signal ratio)")
    panels[0].legend(fontsize=8, ncols=4, frameon=False)
    identity = session.identity
    figure.suptitle(f"{identity['policy']} / {identity['model']}", fontsize=11)
    return figure


def _line(axes: Any, session: Session, concept: str, image: int) -> None:
    xs, ys, thresholds, marks = [], [], [], []
    attempt = len(session.outcomes[image].attempts)
    for record in session.history:
        verdict = record.verdicts[image] if record.attempt == attempt else None
        score = None if verdict is None else _score(verdict.concepts, concept)
        if score is None:
            continue
        xs.append(_level(record, session))
        ys.append(score.probability)
        thresholds.append(_threshold(score, session))
        marks.append(record.actions[image])
    if not xs:
        return
    color = f"C{image % 10}"
    axes.plot(xs, ys, color=color, marker=".", label=f"image {image}")
    axes.plot(xs, thresholds, color="0.4", linestyle="--", linewidth=1)
    for action, marker in (("blocked", "x"), ("steered", "v")):
        at = [i for i, mark in enumerate(marks) if mark == action and ys[i] >= thresholds[i]]
        axes.plot([xs[i] for i in at], [ys[i] for i in at], marker, color=color, markersize=9)


def _level(record: StepRecord, session: Session) -> float:
    """Where a step stands on the axis: pure noise at its left end."""
    levels = [r.noise_level for r in session.history if math.isfinite(r.noise_level)]
    return record.noise_level if math.isfinite(record.noise_level) else 2 * max([1.0, *levels])


def _score(concepts: tuple[ConceptScore, ...], name: str) -> ConceptScore | None:
    return next((score for score in concepts if score.id == name and score.covered), None)


def _threshold(score: ConceptScore, session: Session) -> float:
    """The threshold as a probability, NaN where the concept is not judged."""
    if not score.judged:
        return math.nan
    value = float(score.threshold["value"])
    if score.threshold["kind"] == "probability":
        return value
    margin = float(score.threshold.get("margin", value))
    return 1 / (1 + math.exp(-_logit_scale(score, session) * margin))


def _logit_scale(score: ConceptScore, session: Session) -> float:
    """That of the model which judged: in a cascade the score itself tells it."""
    p = score.probability
    if session.scorer.policy.cascade is None or not score.margin or not 0 < p < 1:
        return float(session.scorer.encoder.logit_scale)
    return math.log(p / (1 - p)) / score.margin


def _closest(session: Session) -> list[str]:
    """The concepts that came closest to their thresholds, at most six, in the policy's order."""
    best: dict[str, float] = {}
    for record in session.history:
        for verdict in record.verdicts:
            for score in () if verdict is None else verdict.concepts:
                if score.covered and score.judged:
                    gap = score.probability - _threshold(score, session)
                    best[score.id] = max(gap, best.get(score.id, -1.0))
    chosen = sorted(best, key=lambda name: best[name], reverse=True)[:_SHOWN]
    return [concept.id for concept in session.scorer.policy.concepts if concept.id in chosen]
