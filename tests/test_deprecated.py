"""Former names warn, and give what the present ones give."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from latentguard.deprecated import (
    UNTIL,
    Former,
    former_keywords,
    former_names,
    former_positions,
)


def warned(use: Callable[[], Any], sentence: str) -> Any:
    """What a use of a former name gives; it must warn once, of this file."""
    with pytest.warns(DeprecationWarning, match=UNTIL) as caught:
        found = use()
    assert [str(one.message) for one in caught] == [f"{sentence}; {UNTIL}"]
    assert caught[0].filename == __file__
    return found


@former_keywords(edge="side")
@dataclass(frozen=True)
class Square:
    side: int = 1

    def area(self) -> int:
        return self.side**2

    surface = Former("area")
    edge = Former("side")


def test_former_methods_and_attributes() -> None:
    square = Square(3)
    assert warned(lambda: square.surface(), "Square.surface is called area now") == 9
    assert warned(lambda: square.edge, "Square.edge is called side now") == 3
    assert warned(lambda: Square.surface(square), "Square.surface is called area now") == 9
    with pytest.raises(AttributeError):
        square.surface = 3  # type: ignore[misc]


def test_former_keywords_of_a_class() -> None:
    make: Any = Square
    assert warned(lambda: make(edge=2), "Square: the argument edge is called side now").side == 2
    with pytest.raises(TypeError, match="Square: edge is the former name of side: give one"):
        make(edge=2, side=2)


def test_former_positions() -> None:
    @former_positions(1, "b", "c")
    def f(a: int, *, b: int = 0, c: int = 0) -> tuple[int, int, int]:
        return a, b, c

    call: Any = f
    name = f.__qualname__
    assert call(1, b=2) == (1, 2, 0)
    assert warned(lambda: call(1, 2), f"{name} takes 1 arguments by place: write b=...") == (
        *(1, 2),
        0,
    )
    assert warned(
        lambda: call(1, 2, 3), f"{name} takes 1 arguments by place: write b=..., c=..."
    ) == (1, 2, 3)
    with pytest.raises(TypeError):
        call(1, 2, 3, 4)
    with pytest.raises(TypeError):
        call(1, 2, b=2)


def test_former_names_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("shapes")
    module.Square = Square
    module.__getattr__ = former_names("shapes", {"Quad": "Square"})
    monkeypatch.setitem(sys.modules, "shapes", module)
    assert warned(lambda: module.Quad, "shapes.Quad is called Square now") is Square
    with pytest.raises(AttributeError, match="module 'shapes' has no attribute 'Circle'"):
        module.Circle  # noqa: B018
