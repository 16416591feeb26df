"""The report as an HTML page: what its templates are given, and how they are filled in.

The templates stand in templates/: page.html, which includes the others. Whatever a value holds,
the reader sees it as one line of text: every expression goes through `visible`, then autoescape.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.environment import TemplateStream
from markupsafe import Markup, escape

from latentguard import __version__
from latentguard.scan.card import CardView
from latentguard.scan.image import data_uri, ramp
from latentguard.scan.report_data import ReportData
from latentguard.scan.scales import BARS, Scales
from latentguard.scan.summary import ModelInfo, Summary
from latentguard.scan.text import visible

BADGES = {
    "block": ("✕", "blocked"),
    "steer": ("↻", "steer"),
    "review": ("!", "review"),
    "error": ("?", "error"),
    "allow": ("✓", "allowed"),
}


def page(
    data: ReportData, models: Sequence[ModelInfo], summary: Summary, date: datetime
) -> TemplateStream:
    """The document, piece by piece: a card's pictures are drawn when its turn comes.

    Everything it needs is inside, and its content policy lets nothing else in.
    """
    script = _asset("report.js")
    scales = Scales.of(data, models)
    cards = data.cards()
    return (
        _environment()
        .get_template("page.html")
        .stream(
            data=data,
            policy=data.rules.policy,
            models=models,
            summary=summary,
            date=date,
            version=__version__,
            style=_asset("report.css"),
            script=script,
            content_policy=_content_policy(script),
            headline=_headline(summary),
            scales=scales,
            ramp=ramp(17).tolist(),
            kinds=sorted({tally.kind for tally in data.tallies.values()}),
            shown=len(cards),
            heats=any(card.heats for card in cards),
            cards=(CardView.of(card, scales, len(models) > 1) for card in cards),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("latentguard.scan"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(badges=BADGES, histogram_width=4 * BARS)
    environment.filters.update(
        whole=_whole, number=_number, count=_count, paragraphs=_paragraphs, picture=_picture
    )
    return environment


def _text(value: object) -> object:
    """What any expression of a template shows, before it is escaped."""
    return value if isinstance(value, Markup) else visible(value, 2000)


def _whole(value: object) -> Markup:
    """Text of any length: attributes that the page's script compares, and what is pointed at."""
    return escape(visible(value, 1 << 30))


def _picture(png: bytes) -> Markup:
    return Markup(data_uri(png))  # base64: nothing in it to escape


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if np.isfinite(value) else "unknown"


def _count(number: int, noun: str = "") -> str:
    """1234, "image": 1,234 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if noun else f"{number:,}"


def _paragraphs(text: str) -> list[str]:
    """Its paragraphs; lines that only wrap are joined."""
    return [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]


def _asset(name: str) -> Markup:
    return Markup((files("latentguard.scan") / "templates" / name).read_text(encoding="utf-8"))


def _content_policy(script: str) -> str:
    """No requests at all, and no script but ours: what slipped past the escaping stays inert."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _headline(summary: Summary) -> str:
    images = _count(summary.images, "image")
    flagged = summary.images - summary.outcomes["allow"]
    if summary.images == 0:
        return "Nothing was scanned"
    return f"{flagged:,} of {images} not allowed" if flagged else f"All of {images} allowed"
