"""What the guard's words were before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentguard import denoised
from latentguard.denoised import Denoised, NoiseLevel, from_consecutive
from latentguard.guard import StepRecord

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
