"""What the templates of a run's report read: a tally, laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from latentguard.judge.verdict import ACTIONS
from latentguard.scan.alternatives import Alternative, alternatives, curve
from latentguard.scan.axis import BARS, Axis, Tick
from latentguard.scan.concept_tally import ConceptTally, Example, Judge, JudgeTally
from latentguard.scan.estimates import Share, percentage, shares
from latentguard.scan.scales import Bar
from latentguard.scan.summary import ModelInfo
from latentguard.scan.tally import PHASES, Tally

HEIGHT = 100
"""Units of height of a figure; it is four units wide for each bar."""

_OPEN = 6
_GERUNDS = {"read": "reading", "decode": "decoding", "score": "scoring"}


@dataclass(frozen=True)
class Row:
    """One other threshold: what it is, its share of the images judged, and how many these are."""

    threshold: str
    share: str
    images: str
    change: str
    in_force: bool


@dataclass(frozen=True)
class Gravest:
    """One example, as its figure shows it."""

    preview: bytes | None
    title: str
    where: str
    score: str
    over: bool


@dataclass(frozen=True)
class ConceptView:
    """One concept by one judge.

    bars, path: histogram and curve of what would match, in units of the figure. mark: where the
    threshold stands, in percent, or None. levels: the shares that the curve's axis names.
    """

    id: str
    concept: ConceptTally
    bars: list[Bar]
    path: str
    mark: float | None
    ticks: list[Tick]
    levels: list[Tick]
    rows: list[Row]
    gravest: list[Gravest]
    open: bool

    @property
    def share(self) -> str:
        return percent(self.concept.matched, self.concept.judged)

    @property
    def threshold(self) -> str:
        value = self.concept.threshold_value
        return score(value) if math.isfinite(value) else "unknown"

    @property
    def highest(self) -> str:
        """The highest score, in the unit of the threshold."""
        if self.concept.unit == "margin":
            return score(self.concept.highest)
        if self.concept.gravest:
            return score(self.concept.gravest[0].probability)
        return f"< {score(curve(self.concept)[-1][0])}"


@dataclass(frozen=True)
class JudgeView:
    """One judge: its concepts, the strictest and most frequent first."""

    judge: Judge
    images: int
    checked: list[ConceptView]
    unchecked: list[str]


@dataclass(frozen=True)
class Phase:
    """What one phase took, over all processes. part: of all phases, in percent."""

    key: str
    name: str
    seconds: float
    part: float
    each: str


@dataclass(frozen=True)
class ShareView:
    """The share of one outcome in the whole, from a sample."""

    share: Share
    estimate: str
    interval: str


def models(tally: Tally) -> list[ModelInfo]:
    """What each judge cannot see, as the box of limits shows it."""
    return [
        ModelInfo(
            key.model,
            key.space,
            judge.notes,
            tuple(name for name, c in sorted(judge.concepts.items()) if not c.judged),
            unseen={
                name: tuple(sorted(c.unseen))
                for name, c in sorted(judge.concepts.items())
                if c.unseen and c.judged
            },
            unseen_contrast=tuple(sorted(judge.unseen_contrast)),
        )
        for key, judge in sorted(tally.judges.items())
    ]


def concept_count(tally: Tally) -> int:
    return len({name for judge in tally.judges.values() for name in judge.concepts})


def judge_views(tally: Tally) -> list[JudgeView]:
    """Each judge's concepts on axes that all of them share."""
    concepts = [c for judge in tally.judges.values() for c in judge.concepts.values()]
    axes = {unit: Axis.of(unit, concepts) for unit in ("probability", "margin")}
    return [_judge_view(key, judge, axes) for key, judge in sorted(tally.judges.items())]


def phases(tally: Tally) -> list[Phase]:
    """How the time was spent; empty if it was not measured."""
    total = sum(tally.seconds(phase) for phase in PHASES)
    if total <= 0:
        return []
    return [
        Phase(
            phase,
            _GERUNDS[phase],
            tally.seconds(phase),
            100 * tally.seconds(phase) / total,
            f"{1000 * tally.seconds(phase) / max(tally.images, 1):.3g} ms",
        )
        for phase in PHASES
        if tally.microseconds[phase]
    ]


def span(tally: Tally) -> tuple[str, float] | None:
    """When the scan began and ended, and the seconds between; None if unknown."""
    if tally.began is None or tally.ended is None:
        return None
    began, ended = (datetime.fromtimestamp(t / 1000, UTC) for t in (tally.began, tally.ended))
    text = f"{began:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M} UTC"
    return text, (tally.ended - tally.began) / 1000


def share_views(tally: Tally) -> list[ShareView]:
    """The estimates of a sample; empty where all images were looked at."""
    if tally.sample is None:
        return []
    return [ShareView(s, percentage(s.share), s.interval) for s in shares(tally.sample)]


def percent(part: int, whole: int) -> str:
    return percentage(part / whole) if whole else "–"


def score(value: float) -> str:
    """A probability or margin; those near 1 and 0 keep the digits that tell them apart."""
    plain = 0.0005 <= abs(value) < 0.9995 or value in (-1, 0, 1) or abs(value) > 1
    text = f"{value:.3f}" if plain else f"{value:.5f}"
    return text.replace("-", "−")


# -- one judge -------------------------------------------------------------------------------


def _judge_view(key: Judge, judge: JudgeTally, axes: dict[str, Axis]) -> JudgeView:
    order = list(ACTIONS)

    def gravest_first(item: tuple[str, ConceptTally]) -> tuple[int, int, str]:
        name, concept = item
        return -order.index(concept.action) if concept.matched else 1, -concept.matched, name

    found = sorted(judge.concepts.items(), key=gravest_first)
    seen = [(name, concept) for name, concept in found if concept.judged]
    checked = [
        _concept_view(name, concept, axes[concept.unit], number < _OPEN and concept.matched > 0)
        for number, (name, concept) in enumerate(seen)
    ]
    unchecked = sorted(name for name, concept in found if not concept.judged)
    return JudgeView(key, judge.images, checked, unchecked)


def _concept_view(name: str, concept: ConceptTally, axis: Axis, unfolded: bool) -> ConceptView:
    threshold = concept.threshold_value
    known = math.isfinite(threshold)
    mark = axis.place(threshold) if known else None
    depth = max(math.ceil(math.log10(concept.judged)), 1)
    return ConceptView(
        name,
        concept,
        _bars(concept, axis, mark, depth),
        _path(concept, axis, depth),
        mark,
        axis.ticks(),
        [Tick(100 * n / depth, f"{10.0 ** (2 - n):g} %") for n in _levels(depth)],
        [_row(concept, row) for row in alternatives(concept)],
        [_gravest(concept, example) for example in concept.gravest],
        unfolded,
    )


def _bars(concept: ConceptTally, axis: Axis, mark: float | None, depth: int) -> list[Bar]:
    """By the logarithm of their share, as the curve: a single image of a billion stays visible."""
    return [
        Bar(
            4 * x + 0.5,
            max(HEIGHT * (1 + math.log10(count / concept.judged) / depth), 3.0),
            mark is not None and 100 * (x + 0.5) / BARS >= mark,
        )
        for x, count in enumerate(axis.bars(concept).tolist())
        if count
    ]


def _path(concept: ConceptTally, axis: Axis, depth: int) -> str:
    """Steps from all images at the top left down to none; one decade is 1/depth of the height."""
    points, last = ["M0 0"], ""
    for threshold, count in curve(concept):
        down = -math.log10(count / concept.judged) / depth if count else 1.0
        x, y = 4 * BARS * axis.place(threshold) / 100, HEIGHT * min(down, 1.0)
        step = f"H{x:.1f}V{y:.1f}"
        if step != last:
            points.append(step)
        last = step
    return "".join(points) + f"H{4 * BARS}"


def _levels(depth: int) -> list[int]:
    """Which decades are named, at most five."""
    every = -(-depth // 4)
    return list(range(0, depth + 1, every))


def _row(concept: ConceptTally, row: Alternative) -> Row:
    low, high = percent(row.low, concept.judged), percent(row.high, concept.judged)
    change = (row.low + row.high) / 2 - concept.matched
    images = f"{row.low:,}" if row.low == row.high else f"{row.low:,}–{row.high:,}"
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    return Row(
        score(row.threshold),
        low if low == high else f"{low.removesuffix(' %')}–{high}",
        images,
        "in force" if row.in_force else f"{sign}{abs(round(change)):,}",
        row.in_force,
    )


def _gravest(concept: ConceptTally, example: Example) -> Gravest:
    place = f"[{example.place}]" if example.place >= 0 else ""
    name = example.source.rstrip("/").rpartition("/")[2] or example.source
    value = example.probability if concept.unit == "probability" else example.margin
    return Gravest(
        example.preview,
        example.id or f"{name}{place}",
        f"{example.source}{place}",
        score(value),
        value >= concept.threshold_value,
    )
