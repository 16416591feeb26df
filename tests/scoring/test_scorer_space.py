"""A Scorer that is told neither model nor space takes both from the first latents."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentguard import Latents, Scorer
from latentguard.errors import LatentsError, ModelError
from latentguard.files import load_latents

EXAMPLES = Path(__file__).parents[2] / "examples" / "latents.pt"


@pytest.fixture(scope="module")
def latents() -> Latents:
    return load_latents(EXAMPLES)[:4]


def test_the_space_is_that_of_the_first_latents(latents: Latents) -> None:
    scorer = Scorer("family", device="cpu")
    told = Scorer("family", space="flux2", device="cpu").verdicts(latents)
    assert scorer.verdicts(latents) == told
    assert scorer.encoder.space == "flux2"


@pytest.mark.parametrize("name", ["encoder", "bank", "bound", "first"])
def test_what_is_not_known_yet_says_how_to_know_it(name: str) -> None:
    with pytest.raises(ModelError, match=rf"to use {name} now, give space"):
        getattr(Scorer("family"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = Scorer("family").nothing


def test_later_latents_are_of_the_same_space(latents: Latents) -> None:
    scorer = Scorer("family", device="cpu")
    scorer.score(latents)
    other = Latents(latents.tensor[:, :4].clone(), "sdxl", scaled=True)
    with pytest.raises(LatentsError, match="reads flux2 latents, got sdxl"):
        scorer.score(other)


def test_space_and_device_are_named() -> None:
    with pytest.raises(TypeError):
        Scorer("family", "auto", "cpu")  # type: ignore[misc]
