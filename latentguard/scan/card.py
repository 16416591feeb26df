"""One image's card in the report: picture, heat maps, verdict, scores against thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from latentguard.scan.image import data_uri, heat_png, outline
from latentguard.scan.markup import Html, el, join
from latentguard.scan.record import ScanRecord

if TYPE_CHECKING:
    from latentguard.judge import ConceptScore
    from latentguard.scan.report import Card

ROWS = 4
"""Concepts shown at once; the rest unfold."""

BADGES = {
    "block": ("✕", "blocked"),
    "steer": ("↻", "steer"),
    "review": ("!", "review"),
    "error": ("?", "error"),
    "allow": ("✓", "allowed"),
}


@dataclass(frozen=True)
class Scales:
    """What all cards of a page share, so that lengths and colours compare across images.

    margin: margins are drawn from -margin to +margin. heat: heat maps are coloured from
    heat below a concept's threshold to heat above it, in margins. limits: model (name, sha256) ->
    concept id -> threshold as a margin.
    """

    margin: float
    heat: float
    limits: Mapping[tuple[str, str], Mapping[str, float]]

    def place(self, value: float, kind: str) -> float:
        """Where a score or threshold stands on its axis, in percent."""
        t = value if kind == "probability" else (value / self.margin + 1) / 2
        return 100 * min(max(t, 0.0), 1.0)


def card(item: Card, scales: Scales, mixed_models: bool) -> Html:
    """One <article>."""
    record = item.record
    matched = [c.id for c in record.ranked if c.matched]
    return el(
        "article",
        _picture(item, scales),
        el(
            "div",
            el("h3", title(record), title=title(record)),
            el("p", _where(record, mixed_models), class_="where"),
            el("p", _reason(record), class_="reason"),
            _scores(item, scales),
            class_="body",
        ),
        class_=f"card {record.outcome}",
        data_outcome=record.outcome,
        data_matched=" ".join(matched),
    )


def title(record: ScanRecord) -> str:
    """What to call an image: its id, else its file and place."""
    if record.id:
        return record.id
    name = record.source.rstrip("/").rpartition("/")[2] or record.source
    return f"{name}[{record.index}]" if record.index >= 0 else name


def number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if np.isfinite(value) else "unknown"


def badge(outcome: str) -> Html:
    sign, word = BADGES[outcome]
    return el("span", el("span", sign, aria_hidden="true"), " ", word, class_=f"badge {outcome}")


def _where(record: ScanRecord, mixed_models: bool) -> Html:
    parts = [record.source + (f"[{record.index}]" if record.index >= 0 else "")]
    if record.space:
        parts.append(record.space)
    if record.size:
        parts.append(f"{record.size[0]}×{record.size[1]}")
    if mixed_models and record.model:
        parts.append(record.model.name)
    return join([" · ".join(parts)])


def _reason(record: ScanRecord) -> str:
    """The reason without the decision before it, which the badge shows."""
    text = record.verdict.reason.removeprefix(f"{record.verdict.decision}: ")
    return text[:1].upper() + text[1:]


def _picture(item: Card, scales: Scales) -> Html:
    record = item.record
    height, width = record.size or (1, 1)
    view: Html
    if item.preview is None:
        view = el("div", "no picture", class_="none")
    else:
        alt = f"Linear RGB view of the latents of {title(record)}"
        view = el("img", src=data_uri(item.preview), alt=alt, class_="view")
    heats = [
        _heat(n, item.heats[name], _limit(record, name, scales), scales)
        for n, name in enumerate(_heat_order(item), start=1)
    ]
    frame = f"aspect-ratio:{width}/{height};width:{100 * min(1.0, width / height):.4g}%"
    return el(
        "div",
        el("div", view, *heats, class_="frame", style=frame),
        badge(record.outcome),
        class_="picture",
    )


def _heat_order(item: Card) -> list[str]:
    return [c.id for c in item.record.ranked if c.id in item.heats]


def _heat(n: int, heat: np.ndarray, limit: float, scales: Scales) -> Html:
    """The overlay of one concept; cells at or above its threshold are outlined as well."""
    heat = heat.astype(np.float64)
    rows, columns = heat.shape
    low, high = limit - scales.heat, limit + scales.heat
    over = outline(heat >= limit)
    lines = [el("path", d=over, class_="halo"), el("path", d=over, class_="edge")] if over else []
    return el(
        "div",
        el("img", src=data_uri(heat_png(heat, low, high)), alt=""),
        el(
            "svg",
            *lines,
            viewBox=f"0 0 {columns} {rows}",
            preserveAspectRatio="none",
            aria_hidden="true",
        ),
        class_=f"heat h{n}",
    )


def _limit(record: ScanRecord, concept: str, scales: Scales) -> float:
    """The threshold as a margin; 0, where a concept ties with its contrast, if it is unknown."""
    model = (record.model.name, record.model.sha256) if record.model else ("", "")
    limit = scales.limits.get(model, {}).get(concept, 0.0)
    return limit if np.isfinite(limit) else 0.0


def _scores(item: Card, scales: Scales) -> Html | None:
    ranked = item.record.ranked
    seen = [c for c in ranked if c.covered]
    unseen = [c for c in item.record.verdict.concepts if not c.covered]
    if not ranked:
        return None
    heats = {name: n for n, name in enumerate(_heat_order(item), start=1)}
    group = f"heat-{item.order}"
    rows = [_row(c, scales, group, heats.get(c.id)) for c in seen]
    more = None
    if len(rows) > ROWS:
        noun = "concept" if len(rows) == ROWS + 1 else "concepts"
        head = el("summary", f"{len(rows) - ROWS} more {noun}")
        more = el("details", head, *rows[ROWS:], class_="more")
    notes = [f"Not checked: {', '.join(c.id for c in unseen)}"] if unseen else []
    notes += [f"Not checked of {c.id}: {', '.join(c.unseen)}" for c in seen if c.unseen]
    swatched = [el("p", el("span", class_="swatch"), note, class_="unseen") for note in notes]
    return el("div", *rows[:ROWS], more, *swatched, class_="scores")


def _row(concept: ConceptScore, scales: Scales, group: str, heat: int | None) -> Html:
    """A bar from the low end of the axis to the score, with a mark at the threshold."""
    kind = concept.threshold["kind"]
    score, limit = concept.score, concept.limit
    at = scales.place(score, str(kind))
    mark = None
    if np.isfinite(limit):
        mark = el("i", class_="limit", style=f"left:{scales.place(limit, str(kind)):.2f}%")
    sign = "≥" if concept.matched else "<"
    unit = "probability" if kind == "probability" else "margin"
    hint = f"{unit} {number(score)}, threshold {number(limit)}; best prompt: {concept.prompt}"
    content = (
        el("span", concept.id, class_="name"),
        el(
            "span",
            el("b", class_="fill", style=f"width:{at:.2f}%"),
            mark,
            class_="track",
            aria_hidden="true",
        ),
        el("span", el("b", number(score)), f" {sign} {number(limit)}", class_="figures"),
    )
    style = f"row {'matched ' + concept.action if concept.matched else 'under'}"
    if heat is None:
        return el("div", *content, class_=style, title=hint)
    pick = el(
        "input",
        type="radio",
        name=group,
        class_=f"pick p{heat}",
        checked=heat == 1,
        aria_label=f"heat map of {concept.id}",
    )
    return el("label", pick, *content, class_=style, title=hint)
