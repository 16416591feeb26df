"""A Scorer that is told neither model nor space takes both from the first latents."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentguard import Latents, Scorer, load_encoder
from latentguard.errors import CoverageError, LatentsError, ModelError
from latentguard.files import load_latents
from latentguard.policy import load_policy
from latentguard.policy.loading import parse_policy
from latentguard.policy.models import Cascade
from latentguard.scorer import _encoder

EXAMPLES = Path(__file__).parents[2] / "examples" / "latents.pt"


UNSEEN = """
schema_version: 1
name: unseen
version: "1"
concepts:
  - {id: nudity, category: sexual, prompts: [nude person], threshold: {margin: 0.1}, action: block}
"""


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
    whole = load_policy("family")
    policy = whole.model_copy(
        update={
            "cascade": Cascade(first="nano-view", unsure=0.1),
            "concepts": tuple(c for c in whole.concepts if c.id == "beer"),
        }
    )
    scorer = Scorer(policy, "nano-flux2", device="cpu")
    assert scorer.first is not None
    assert (scorer.first.encoder.name, scorer.first.encoder.space) == ("nano-view", "flux2")
    assert len(scorer.verdicts(latents)) == 4


def test_space_and_device_are_named() -> None:
    with pytest.raises(TypeError):
        Scorer("family", "auto", "cpu")  # type: ignore[misc]


def test_a_scorer_that_could_not_be_bound_says_so_each_time(latents: Latents) -> None:
    scorer = Scorer(parse_policy(UNSEEN), "nano-view", device="cpu")
    for _ in range(2):
        with pytest.raises(CoverageError, match="cannot see"):
            scorer.verdicts(latents)
    assert scorer.space is None


def test_threads_that_bring_the_first_latents_get_the_same_verdicts(
    latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(load_policy("family").with_views("crops"), device="cpu")
    bind, calls = Scorer._bind, []

    def slow(self: Scorer, space: str | None) -> None:
        calls.append(space)
        time.sleep(0.1)
        bind(self, space)

    monkeypatch.setattr(Scorer, "_bind", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: scorer.verdicts(latents), range(4)))
    assert all(one == found[0] for one in found)
    assert found[0][0].model.name.endswith("+views=crops")
    assert calls == ["flux2"]


def test_an_encoder_is_not_taken_from_where_another_scorer_uses_it(latents: Latents) -> None:
    encoder = load_encoder("nano-flux2", "cpu")
    scorer = Scorer("family", encoder, device="cpu")
    assert scorer.encoder is encoder
    before = scorer.verdicts(latents)
    # A tensor of the device "meta" has no numbers, but can be moved to as to a second GPU.
    assert _encoder(encoder, "meta", None).device.type == "meta"
    assert encoder.device.type == "cpu"
    assert scorer.verdicts(latents) == before
