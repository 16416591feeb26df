"""How the pages' templates are filled in.

Whatever a value holds, the reader sees it as one line of text: every expression goes through
`visible`, then autoescape.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from latentguard.scan.image import data_uri
from latentguard.scan.text import visible
from latentguard.text import counted

BADGES = {
    "block": ("✕", "blocked"),
    "steer": ("↻", "steer"),
    "review": ("!", "review"),
    "error": ("?", "error"),
    "allow": ("✓", "allowed"),
}


@cache
def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("latentguard.scan"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals.update(badges=BADGES)
    made.filters.update(
        whole=_whole, number=_number, count=counted, paragraphs=_paragraphs, picture=_picture
    )
    return made


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


def _paragraphs(text: str) -> list[str]:
    """Its paragraphs; lines that only wrap are joined."""
    return [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]


def asset(name: str) -> Markup:
    return Markup((files("latentguard.scan") / "templates" / name).read_text(encoding="utf-8"))


def content_policy(script: str) -> str:
    """No requests at all, and no script but ours: what slipped past the escaping stays inert."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
