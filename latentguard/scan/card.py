"""One image's card in the report, as the values that its template shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentguard.judge import Categories, ConceptScore
from latentguard.scan.image import heat_png, outline
from latentguard.scan.record import ScanRecord
from latentguard.scan.report_data import Card
from latentguard.scan.scales import Scales


@dataclass(frozen=True)
class Row:
    """One concept's bar, from the low end of the axis to the score.

    fill, mark: where score and threshold stand on the axis, in percent; no mark where the
    threshold is unknown. heat: the number of its heat map on the card, from 1, or None.
    """

    concept: ConceptScore
    fill: float
    mark: float | None
    heat: int | None


@dataclass(frozen=True)
class Heat:
    """The overlay of one concept: `rows` x `columns` cells, those at its threshold outlined."""

    number: int
    png: bytes
    rows: int
    columns: int
    outline: str


@dataclass(frozen=True)
class CardView:
    """All that the template of a card reads."""

    order: int
    record: ScanRecord
    preview: bytes | None
    title: str
    where: str
    reason: str
    heats: list[Heat]
    rows: list[Row]
    unchecked: list[str]
    categories: list[str]

    @classmethod
    def of(cls, card: Card, scales: Scales, mixed_models: bool) -> CardView:
        """mixed_models: whether the card has to say which model judged."""
        record = card.record
        mapped = [c.id for c in record.ranked if c.id in card.heats]
        seen = [c for c in record.ranked if c.covered]
        unseen = ", ".join(c.id for c in record.verdict.concepts if not c.covered)
        unchecked = [f"Not checked: {unseen}"] if unseen and record.ranked else []
        unchecked += [f"Not checked of {c.id}: {', '.join(c.unseen)}" for c in seen if c.unseen]
        return cls(
            order=card.order,
            record=record,
            preview=card.preview,
            title=_title(record),
            where=_where(record, mixed_models),
            reason=_reason(record),
            heats=[
                _heat(number, card.heats[name], scales.threshold(record, name), scales.heat)
                for number, name in enumerate(mapped, start=1)
            ],
            rows=[
                _row(c, scales, mapped.index(c.id) + 1 if c.id in mapped else None) for c in seen
            ],
            unchecked=unchecked,
            categories=[_told(found) for found in record.verdict.taxonomies],
        )


def _title(record: ScanRecord) -> str:
    """What to call an image: its id, else its file and place."""
    if record.id:
        return record.id
    name = record.source.rstrip("/").rpartition("/")[2] or record.source
    return f"{name}[{record.index}]" if record.index >= 0 else name


def _where(record: ScanRecord, mixed_models: bool) -> str:
    parts = [record.source + (f"[{record.index}]" if record.index >= 0 else "")]
    if record.space:
        parts.append(record.space)
    if record.size:
        parts.append(f"{record.size[0]}×{record.size[1]}")
    if mixed_models and record.model:
        parts.append(record.model.name)
    return " · ".join(parts)


def _told(found: Categories) -> str:
    """An image in a scheme's words: flagged categories with their scores, and the gaps."""
    parts = []
    for category in found.flagged:
        name = found.names[category]
        level = (found.severities or {}).get(category)
        parts.append(
            (name if name == category else f"{category} {name}")
            + f" {found.scores[category]:.3f}"
            + ("" if level is None else f", severity {level}")
        )
    text = f"{found.scheme} {found.version}: {'; '.join(parts) or 'nothing flagged'}"
    unscored = [category for category, score in found.scores.items() if score is None]
    return text + (f" · not checked: {', '.join(unscored)}" if unscored else "")


def _reason(record: ScanRecord) -> str:
    """The reason without the decision before it, which the badge shows."""
    text = record.verdict.reason.removeprefix(f"{record.verdict.decision}: ")
    return text[:1].upper() + text[1:]


def _heat(number: int, heat: np.ndarray, threshold: float, reach: float) -> Heat:
    """`reach`: how far from the threshold, in margins, the colors change."""
    heat = heat.astype(np.float64)
    rows, columns = heat.shape
    png = heat_png(heat, threshold - reach, threshold + reach)
    return Heat(number, png, rows, columns, outline(heat >= threshold))


def _row(concept: ConceptScore, scales: Scales, heat: int | None) -> Row:
    kind = str(concept.threshold["kind"])
    known = np.isfinite(concept.threshold_value)
    return Row(
        concept,
        fill=scales.place(concept.score, kind),
        mark=scales.place(concept.threshold_value, kind) if known else None,
        heat=heat,
    )
