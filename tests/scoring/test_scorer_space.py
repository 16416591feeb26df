"""A Scorer that is told neither model nor space takes both from the first latents."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentguard import Latents, Scorer
from latentguard.errors import LatentsError, ModelError
from latentguard.files import load_latents
from latentguard.policy import load_policy
from latentguard.policy.models import Cascade

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


def test_a_model_of_several_spaces_takes_that_of_the_first_latents(latents: Latents) -> None:
    scorer = Scorer("family", "nano-view", device="cpu")
    with pytest.raises(ModelError, match="model 'nano-view' depends on the latents' space"):
        _ = scorer.encoder
    scorer.score(latents)
    assert (scorer.encoder.name, scorer.encoder.space) == ("nano-view", "flux2")
    with pytest.raises(LatentsError, match="reads flux2 latents, got sd1"):
        scorer.score(Latents(latents.tensor[:, :4].clone(), "sd1", scaled=True))
    assert Scorer("family", "nano-view", space="sd3", device="cpu").space == "sd3"


def test_the_first_model_of_a_cascade_reads_the_space_of_the_second(latents: Latents) -> None:
    policy = load_policy("family").model_copy(
        update={"cascade": Cascade(first="nano-view", unsure=0.1)}
    )
    scorer = Scorer(policy, "nano-flux2", device="cpu")
    assert scorer.first is not None
    assert (scorer.first.encoder.name, scorer.first.encoder.space) == ("nano-view", "flux2")
    assert len(scorer.verdicts(latents)) == 4


def test_space_and_device_are_named() -> None:
    with pytest.raises(TypeError):
        Scorer("family", "auto", "cpu")  # type: ignore[misc]
