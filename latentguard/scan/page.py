"""The whole page of the report: header, limits, concepts, cards, how to read it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from latentguard import __version__
from latentguard.judge import Rule
from latentguard.scan.card import BADGES, Scales, badge, card, number
from latentguard.scan.image import ramp
from latentguard.scan.markup import Html, el, join
from latentguard.scan.summary import ModelInfo, Summary

if TYPE_CHECKING:
    from latentguard.scan.report import Report, Tally

HISTOGRAM = 40
"""Bars of a concept's histogram."""


def page(report: Report, models: Sequence[ModelInfo], summary: Summary, date: datetime) -> str:
    """The document. Everything it needs is inside, and its policy lets nothing else in."""
    style, script = (Html(_asset(name)) for name in ("report.css", "report.js"))
    cards = report.cards()
    scales = _scales(report, models)
    heats = any(item.heats for item in cards)
    name = f"Scan with policy {report.rules.policy.name}"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_content_policy(script)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
        el("meta", name="generator", content=f"latentguard {__version__}"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{name}: {summary.line()}"),
        el("style", style),
    )
    body = el(
        "body",
        _header(report, models, summary, date),
        el(
            "main",
            _limits(report, models),
            _concepts(report, models, scales),
            _toolbar(report, summary, heats, scales),
            _omitted(report, summary, len(cards)),
            el(
                "section",
                *[card(item, scales, len(models) > 1) for item in cards],
                class_="cards",
                aria_label="Images",
            ),
            el("p", "No image matches these filters.", id="nothing", hidden=True),
        ),
        _footer(report, models, heats),
        el("script", script),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return (files("latentguard.scan") / name).read_text(encoding="utf-8")


def _content_policy(script: str) -> str:
    """No requests at all, and no script but ours: what slipped past the escaping stays inert."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _scales(report: Report, models: Sequence[ModelInfo]) -> Scales:
    """Axes wide enough for every image, and heat colours for all but the most extreme cells."""
    ends = [0.02]
    for tally in report.tallies.values():
        if tally.kind == "margin" and tally.judged:
            values = (tally.highest, tally.lowest, tally.threshold)
            ends += [abs(v) for v in values if np.isfinite(v)]
    limits = {(m.id.name, m.id.sha256): m.limits for m in models}
    gaps = []
    for item in report.cards():
        model = item.record.model
        known = limits.get((model.name, model.sha256), {}) if model else {}
        gaps += [np.abs(h - known.get(k, 0.0)).ravel() for k, h in item.heats.items()]
    far = np.concatenate(gaps or [np.zeros(1)]).astype(np.float64)
    far = far[np.isfinite(far)]
    heat = float(np.percentile(far, 98)) if far.size else 0.0
    return Scales(margin=1.05 * max(ends), heat=max(heat, 0.01), limits=limits)


def _paragraphs(text: str) -> list[str]:
    """Its paragraphs; lines that only wrap are joined."""
    return [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]


# -- header ----------------------------------------------------------------------------------


def _header(report: Report, models: Sequence[ModelInfo], summary: Summary, date: datetime) -> Html:
    policy = report.rules.policy
    facts = [
        _fact("Policy", f"{policy.name} {policy.version}", policy.sha256),
        *[_fact(f"Model for {m.space}", m.id.name, m.id.sha256) for m in models],
        _fact("Date", date.strftime("%Y-%m-%d %H:%M UTC"), ""),
    ]
    return el(
        "header",
        el(
            "div",
            _mark(),
            el("span", "latentguard", class_="brand"),
            el("span", f"scan report · {__version__}", class_="version"),
            class_="line",
        ),
        el("h1", _headline(summary)),
        _tiles(summary),
        el("dl", *facts, class_="facts"),
        el("p", passed, class_="passed") if (passed := summary.passed.line()) else None,
    )


def _headline(summary: Summary) -> str:
    images = "1 image" if summary.images == 1 else f"{summary.images:,} images"
    flagged = summary.images - summary.outcomes["allow"]
    if summary.images == 0:
        return "Nothing was scanned"
    return f"{flagged:,} of {images} not allowed" if flagged else f"All of {images} allowed"


def _mark() -> Html:
    """The sign of the project: a grid of latents, one cell of which is caught."""
    cells = [
        el(
            "rect",
            x=x * 7,
            y=y * 7,
            width=6,
            height=6,
            rx=1,
            class_="hit" if (x, y) == (2, 1) else "",
        )
        for y in range(3)
        for x in range(4)
    ]
    return el("svg", *cells, viewBox="0 0 27 20", class_="mark", aria_hidden="true")


def _tiles(summary: Summary) -> Html:
    """The counts, and below them the shares as one bar."""
    shown = [o for o in BADGES if summary.outcomes[o] or o != "steer"]
    total = max(summary.images, 1)
    tiles = [
        el(
            "div",
            el("strong", f"{summary.outcomes[o]:,}"),
            badge(o),
            class_=f"tile {o}{'' if summary.outcomes[o] else ' zero'}",
        )
        for o in shown
    ]
    shares = [
        el("i", class_=o, style=f"width:{100 * summary.outcomes[o] / total:.3f}%")
        for o in shown
        if summary.outcomes[o]
    ]
    return join(
        [
            el("div", *tiles, class_="tiles"),
            el("div", *shares, class_="shares", aria_hidden="true"),
        ]
    )


def _fact(name: str, value: str, digest: str) -> Html:
    mark = el("code", digest[:12], title=f"sha256 {digest}") if digest else None
    return el("div", el("dt", name), el("dd", value, " " if mark else None, mark))


# -- what the models cannot see --------------------------------------------------------------


def _limits(report: Report, models: Sequence[ModelInfo]) -> Html | None:
    """The box that says what an "allowed" does not mean."""
    parts = []
    total = len(report.rules.concepts)
    for model in models:
        if not (model.uncovered or model.unseen or model.unseen_contrast or model.notes):
            continue
        parts.append(el("h3", model.id.name))
        if model.uncovered:
            names = [el("li", name) for name in model.uncovered]
            parts.append(
                el(
                    "p",
                    el("strong", f"Cannot see {len(model.uncovered)} of {total} concepts. "),
                    "They were not checked: that an image is allowed says nothing about them.",
                )
            )
            parts.append(el("ul", *names, class_="chips"))
        for name, prompts in model.unseen.items():
            text = f"Cannot see {len(prompts)} of the prompts of {name}. "
            rest = "They were not checked, the concept's other prompts were."
            parts.append(el("p", el("strong", text), rest))
            parts.append(el("ul", *[el("li", prompt) for prompt in prompts], class_="chips"))
        if model.unseen_contrast:
            listed = ", ".join(model.unseen_contrast)
            text = "Contrast prompts that it cannot see, so that nothing was compared with them: "
            parts.append(el("p", f"{text}{listed}.", class_="notes"))
        if model.notes:
            parts += [el("p", line, class_="notes") for line in _paragraphs(model.notes)]
    if not parts:
        return None
    hatched = "limits hatched" if any(m.uncovered or m.unseen for m in models) else "limits"
    return el("section", el("h2", "What this scan cannot see"), *parts, class_=hatched)


# -- concepts over all images ----------------------------------------------------------------


def _concepts(report: Report, models: Sequence[ModelInfo], scales: Scales) -> Html:
    columns = ("Concept", "Action", "Matched", "Scores of all images", "Highest", "Threshold")
    rows = [_concept(rule, report.tallies[rule.id], scales) for rule in report.rules.concepts]
    table = el(
        "table",
        el("thead", el("tr", *[el("th", name, scope="col") for name in columns])),
        el("tbody", *rows),
    )
    opened = len(rows) <= 24
    count = "1 concept" if len(rows) == 1 else f"{len(rows):,} concepts"
    return el(
        "details",
        el("summary", el("h2", f"Policy: {count}")),
        el("div", table, class_="scroll"),
        class_="concepts",
        open=opened,
    )


def _concept(rule: Rule, tally: Tally, scales: Scales) -> Html:
    category = el("small", f" {rule.category}")
    name = el(
        "th",
        el("b", rule.id),
        category,
        scope="row",
        title=rule.description or None,
    )
    action = el("td", rule.action, class_=f"action {rule.action}")
    if not tally.judged:
        unseen = el("td", el("span", class_="swatch"), "not checked", colspan=4, class_="unseen")
        return el("tr", name, action, unseen)
    return el(
        "tr",
        name,
        action,
        el(
            "td",
            f"{tally.matched:,}",
            class_=f"n some {rule.action}" if tally.matched else "n",
        ),
        el("td", _histogram(tally, scales), class_=f"plot {rule.action}"),
        el("td", number(tally.highest), class_="n"),
        el("td", number(tally.threshold), class_="n"),
    )


def _histogram(tally: Tally, scales: Scales) -> Html:
    """Bars of counts (square root, so that a single image stays visible) and the threshold."""
    bins = len(tally.scores)
    low, high = (0.0, 1.0) if tally.kind == "probability" else (-scales.margin, scales.margin)
    centres = (np.arange(bins) + 0.5) / bins * 4 - 2
    place = np.clip((centres - low) / (high - low) * HISTOGRAM, 0, HISTOGRAM - 1).astype(int)
    counts = np.bincount(place, weights=tally.scores, minlength=HISTOGRAM)
    tallest = max(np.sqrt(counts.max()), 1.0)
    limit = (tally.threshold - low) / (high - low) * HISTOGRAM
    bars = []
    for x in np.flatnonzero(counts):
        size = max(20 * float(np.sqrt(counts[x])) / tallest, 2.0)
        over = "over" if x + 0.5 >= limit else None
        bars.append(
            el(
                "rect",
                x=f"{4 * x + 0.5:g}",
                y=f"{22 - size:.2f}",
                width=3,
                height=f"{size:.2f}",
                class_=over,
            )
        )
    line = None
    if np.isfinite(limit):
        at = f"{4 * min(max(limit, 0.0), HISTOGRAM):.2f}"
        line = el("line", x1=at, x2=at, y1=0, y2=24, class_="limit")
    base = el("line", x1=0, x2=4 * HISTOGRAM, y1=22.5, y2=22.5, class_="base")
    text = f"{tally.judged} scores from {number(tally.lowest)} to {number(tally.highest)}"
    size_box = f"0 0 {4 * HISTOGRAM} 24"
    return el(
        "svg",
        el("title", text),
        base,
        *bars,
        line,
        viewBox=size_box,
        preserveAspectRatio="none",
        class_="histogram",
    )


# -- finding images --------------------------------------------------------------------------


def _toolbar(report: Report, summary: Summary, heats: bool, scales: Scales) -> Html:
    outcomes = [
        el(
            "label",
            el("input", type="checkbox", name="outcome", value=o, checked=True),
            badge(o),
            class_="check",
        )
        for o in BADGES
        if summary.outcomes[o]
    ]
    concepts = [name for name in report.rules.ids if report.tallies[name].judged]
    options = [
        el("option", f"{name} ({report.tallies[name].matched})", value=name) for name in concepts
    ]
    find = el(
        "div",
        el(
            "input",
            type="search",
            id="search",
            placeholder="Search id, file, prompt",
            aria_label="Search",
        ),
        el(
            "select",
            el("option", "any concept", value=""),
            *options,
            id="concept",
            aria_label="Concept",
        ),
        el("span", *outcomes, class_="group"),
        el("output", id="shown", aria_live="polite"),
        class_="find",
        hidden=True,
    )
    look = el(
        "div",
        _heat_switch() if heats else None,
        _legend(scales) if heats else None,
        el("label", el("input", type="checkbox", id="blur"), " Blur pictures", class_="check"),
        class_="look",
    )
    return el("section", el("h2", "Images"), find, look, class_="toolbar", aria_label="Filters")


def _heat_switch() -> Html:
    choices = (("off", "off", False), ("flagged", "if not allowed", True), ("all", "all", False))
    radios = [
        el(
            "label",
            el("input", type="radio", name="heat", id=f"heat-{key}", checked=chosen),
            f" {text}",
            class_="check",
        )
        for key, text, chosen in choices
    ]
    return el("span", "Heat maps:", *radios, class_="group", role="group", aria_label="Heat maps")


def _legend(scales: Scales) -> Html:
    stops = ",".join(f"rgb({r} {g} {b}/{a / 255:.2f})" for r, g, b, a in ramp(17))
    span = number(scales.heat)
    return el(
        "span",
        el("span", f"−{span}"),
        el(
            "span", el("i"), class_="ramp", style=f"background-image:linear-gradient(90deg,{stops})"
        ),
        el("span", f"+{span}"),
        el("span", "margin under and over the threshold; cells that reach it are outlined"),
        class_="legend",
    )


def _omitted(report: Report, summary: Summary, shown: int) -> Html | None:
    left = summary.images - shown
    if left <= 0:
        return None
    return el(
        "p",
        f"{shown:,} of {summary.images:,} images are shown, those not allowed before the others; "
        f"{left:,} are counted but left out to keep this page small.",
        class_="omitted",
        role="note",
    )


# -- footer ----------------------------------------------------------------------------------


def _footer(report: Report, models: Sequence[ModelInfo], heats: bool) -> Html:
    policy = report.rules.policy
    kinds = {t.kind for t in report.tallies.values()}
    lines = [
        "Pictures are a linear RGB view of the latents, one pixel a cell: no decoder has run, so "
        "colours are near and detail is missing.",
        "A margin is the best cosine over a concept's prompts minus the best over its contrast "
        "prompts. A probability is the logistic function of the margin times the model's logit "
        "scale: 0.5 is a tie with the contrast, not an even chance.",
        "A bar ends at the score; the mark across it is the threshold. "
        + (
            "Margins are drawn from one common low end to one common high end."
            if kinds == {"margin"}
            else "The bar's ends are 0 and 1."
            if kinds == {"probability"}
            else "Probabilities are drawn from 0 to 1, margins between two common ends."
        ),
    ]
    if heats:
        lines.append(
            "A heat map scores each place of the latent grid on its own. It shows what the model "
            "went by; the decision comes from the score of the whole image."
        )
    digests = [("policy " + policy.name, policy.sha256)]
    digests += [(m.id.name, m.id.sha256) for m in models]
    rows = [el("tr", el("th", name, scope="row"), el("td", el("code", d))) for name, d in digests]
    about = [el("p", line) for line in _paragraphs(report.rules.description)]
    return el(
        "footer",
        el("h2", "How to read this page"),
        el("ul", *[el("li", line) for line in lines]),
        el("h2", f"Policy {policy.name} {policy.version}") if about else None,
        *about,
        el("h2", "SHA-256"),
        el("div", el("table", *rows, class_="digests"), class_="scroll"),
    )
