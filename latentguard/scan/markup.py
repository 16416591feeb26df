"""HTML built from values: every string is escaped unless it is `Html` already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from latentguard.scan.text import visible

_VOID = frozenset({"meta", "img", "input", "br", "link"})


class Html(str):
    """Markup that is known to be safe; `el` and `join` make it, nothing else should."""

    __slots__ = ()


Child = str | int | float | Html | None


def el(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """One element. `class_` and `for_` lose their underscore, others become dashes.

    An attribute that is True stands alone, one that is False or None is left out.
    """
    parts = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        parts.append(f" {name}" if value is True else f' {name}="{_attribute(value)}"')
    opening = f"<{tag}{''.join(parts)}>"
    return Html(opening) if tag in _VOID else Html(f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after the other, escaped where they are not Html."""
    return Html("".join(_child(c) for c in children if c is not None))


def _child(child: Child) -> str:
    return child if isinstance(child, Html) else escape(visible(child, 2000), quote=True)


def _attribute(value: str | int | float) -> str:
    """Attribute text; data URIs are long and made here, so nothing is shortened."""
    return escape(visible(value, 1 << 30), quote=True)
