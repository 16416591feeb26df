"""The report as an HTML page: what its templates are given, and how they are filled in.

The templates stand in templates/: page.html, which includes the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from jinja2.environment import TemplateStream

from latentguard import __version__
from latentguard.scan.card import CardView
from latentguard.scan.image import ramp
from latentguard.scan.report_data import ReportData
from latentguard.scan.scales import BARS, Scales
from latentguard.scan.summary import ModelInfo, Summary
from latentguard.scan.templating import asset, content_policy, environment
from latentguard.text import counted


def page(
    data: ReportData, models: Sequence[ModelInfo], summary: Summary, date: datetime
) -> TemplateStream:
    """The document, piece by piece: a card's pictures are drawn when its turn comes.

    Everything it needs is inside, and its content policy lets nothing else in.
    """
    script = asset("report.js")
    scales = Scales.of(data, models)
    cards = data.cards()
    return (
        environment()
        .get_template("page.html")
        .stream(
            data=data,
            histogram_width=4 * BARS,
            policy=data.rules.policy,
            models=models,
            summary=summary,
            date=date,
            version=__version__,
            style=asset("report.css"),
            script=script,
            content_policy=content_policy(script),
            headline=_headline(summary),
            scales=scales,
            ramp=ramp(17).tolist(),
            kinds=sorted({tally.kind for tally in data.tallies.values()}),
            concept_count=len(data.rules.concepts),
            shown=len(cards),
            heats=any(card.heats for card in cards),
            cards=(CardView.of(card, scales, len(models) > 1) for card in cards),
        )
    )


def _headline(summary: Summary) -> str:
    images = counted(summary.images, "image")
    flagged = summary.images - summary.outcomes["allow"]
    if summary.images == 0:
        return "Nothing was scanned"
    return f"{flagged:,} of {images} not allowed" if flagged else f"All of {images} allowed"
