"""What the guard's words were before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentguard import LatentGuard, Scorer, denoised, guard
from latentguard.denoised import Denoised, NoiseLevel, from_consecutive
from latentguard.guard import Budget, Session, StepRecord, session

BEFORE, AFTER = NoiseLevel(1.0, 2.0), NoiseLevel(1.0, 1.0)
X0 = torch.ones(1)
ESTIMATE = Denoised(X0, BEFORE, AFTER, "epsilon")
RECORD = StepRecord(0, 1.0, "epsilon", False, (), (), (), 0.1)


def warned(use: Callable[[], Any], *, old: str, new: str) -> Any:
    """What a use of a former name gives; it must warn once, of this file."""
    with pytest.warns(DeprecationWarning, match=rf"\b{old} is called {new} now") as caught:
        found = use()
    assert (len(caught), caught[0].filename) == (1, __file__)
    return found


@pytest.mark.parametrize(
    ("holder", "old", "new"),
    [
        (ESTIMATE, "source", "level_before"),
        (ESTIMATE, "latents", "level_after"),
        (ESTIMATE, "how", "estimate_source"),
        (RECORD, "how", "estimate_source"),
        (denoised, "Level", "NoiseLevel"),
        (Budget(scoring=2.0), "budget", "scoring"),
        (guard, "Limits", "Budget"),
    ],
)
def test_former_attributes(holder: Any, old: str, new: str) -> None:
    assert warned(lambda: getattr(holder, old), old=old, new=new) is getattr(holder, new)


def test_former_keywords() -> None:
    a, b, words = torch.randn(1), torch.randn(1), {"old": "latents", "new": "level_after"}
    call: Any = from_consecutive
    found = warned(lambda: call(a, b, BEFORE, latents=AFTER), **words)
    assert torch.equal(found, from_consecutive(a, b, BEFORE, AFTER))
    make: Any = Denoised
    words = {"old": "how", "new": "estimate_source"}
    assert warned(lambda: make(X0, BEFORE, AFTER, how="epsilon"), **words) == ESTIMATE


def test_former_keywords_of_a_budget() -> None:
    make: Any = Budget
    assert warned(lambda: make(budget=2.0), old="budget", new="scoring") == Budget(scoring=2.0)
    with pytest.raises(ValueError, match="scoring must be at or above 0, got -1"):
        warned(lambda: make(budget=-1.0), old="budget", new="scoring")


def test_former_arguments_of_a_session() -> None:
    call: Any = session
    make_session: Any = Session
    make_guard: Any = LatentGuard
    budget = Budget(steps=3)
    shared = Scorer("weapons", "nano-flux2")
    one: Any = warned(lambda: call(shared.policy, encoder=shared), old="encoder", new="model")
    assert one.scorer is shared
    one = warned(lambda: call(shared.policy, shared, limits=budget), old="limits", new="budget")
    assert one.budget is budget
    assert warned(lambda: one.limits, old="limits", new="budget") is budget
    one = warned(lambda: make_session(shared, limits=budget), old="limits", new="budget")
    assert one.budget is budget
    with pytest.warns(DeprecationWarning, match="2 arguments by place: write request_id") as caught:
        assert call(shared.policy, shared, "mine").request_id == "mine"
    assert caught[0].filename == __file__
    made = warned(lambda: make_guard("weapons", limits=budget), old="limits", new="budget")
    assert made.session(space="flux2").budget is budget
