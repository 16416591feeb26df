"""Numbers that no latents have are an error of their image, and of no other one of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentguard import Latents, Scorer
from latentguard.files import load_latents
from latentguard.judge.numbers import LARGEST
from latentguard.policy.loading import parse_policy
from latentguard.policy.models import Cascade
from latentguard.spaces import Prediction

EXAMPLES = Path(__file__).parents[2] / "examples" / "latents.pt"
PLAIN = parse_policy("""
schema_version: 1
name: pistols
version: "1"
space: flux2
concepts:
  - {id: guns, category: weapons, prompts: [revolver], threshold: {margin: 0.1}, action: block}
""")
BEYOND = (torch.nan, torch.inf, -torch.inf, 1.1 * LARGEST, -1e30)


@pytest.fixture(scope="module")
def latents() -> Latents:
    found = load_latents(EXAMPLES)[:3]
    return Latents(found.tensor.float(), found.space, found.scaled)


def with_one(latents: Latents, value: float) -> Latents:
    """The same, with one number of the second image replaced."""
    tensor = latents.tensor.clone()
    tensor[1, 0, 3, 5] = value
    return Latents(tensor, latents.space, latents.scaled)


@pytest.mark.parametrize("value", BEYOND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model", ["nano-flux2", "nano-view"])
def test_one_number_beyond_all_latents_is_an_error_of_its_image(
    latents: Latents, model: str, dtype: torch.dtype, value: float
) -> None:
    scorer = Scorer("family", model, space="flux2", device="cpu")
    given = Latents(latents.tensor.to(dtype), latents.space, latents.scaled)
    plain, found = scorer.verdicts(given), scorer.verdicts(with_one(given, value))
    assert [verdict.error is None for verdict in found] == [True, False, True]
    assert found[1].decision == "block"
    assert found[::2] == plain[::2]


def test_the_largest_number_is_judged(latents: Latents) -> None:
    found = Scorer("family", space="flux2", device="cpu").verdicts(with_one(latents, LARGEST))
    assert [verdict.error for verdict in found] == [None] * 3


@pytest.mark.parametrize(
    "policy",
    [
        PLAIN.with_views("crops"),
        PLAIN.model_copy(update={"cascade": Cascade(first="nano-view", unsure=0.05)}),
    ],
    ids=["crops", "cascade"],
)
def test_in_crops_and_behind_a_cascade(latents: Latents, policy: object) -> None:
    scorer = Scorer(policy, "nano-flux2", device="cpu")  # type: ignore[arg-type]
    found = scorer.verdicts(with_one(latents, -1e30))
    assert [verdict.error is None for verdict in found] == [True, False, True]


def test_packed_latents(latents: Latents) -> None:
    found = Scorer("family", device="cpu").verdicts(with_one(latents, 1e8).to_packed())
    assert [verdict.error is None for verdict in found] == [True, False, True]


@pytest.mark.parametrize(
    ("value", "alpha", "good"), [(1.0, 1.0, True), (1e8, 1.0, False), (1.0, 1e-8, False)]
)
def test_of_a_prediction_its_clean_estimate_counts(
    latents: Latents, value: float, alpha: float, good: bool
) -> None:
    noise = torch.zeros_like(latents.tensor)
    noise[1, 0, 0, 0] = value
    clean = Latents(latents.tensor * alpha, latents.space, latents.scaled)
    scorer = Scorer("family", device="cpu")
    found = scorer.verdicts(Prediction(clean, noise, alpha, 0.5), final=False)
    assert [verdict.error is None for verdict in found] == [True, good, True]


def test_gradients_are_those_of_the_score(latents: Latents) -> None:
    tensor = with_one(latents, 1e8).tensor.requires_grad_()
    margin = Scorer("family", device="cpu").score(Latents(tensor, "flux2", scaled=True)).margin
    assert margin.isnan().any(1).tolist() == [False, True, False]
    margin[[0, 2]].sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.isfinite().all()
    assert tensor.grad[0].any()
