"""The search for a noise that the policy allows, on real one-step pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import EulerAncestralDiscreteScheduler
from guard_helpers import LinearEncoder, policy

from latentguard import Latents, Scorer, optimize_noise
from latentguard.errors import LatentsError


def _turbo() -> Any:
    options = {**small.BETAS, "timestep_spacing": "trailing"}
    return small.sdxl(scheduler=EulerAncestralDiscreteScheduler(**options))


def _one_step() -> dict[str, Any]:
    arguments = small.sdxl_arguments(steps=1, guidance_scale=0.0)
    del arguments["generator"], arguments["output_type"]
    return {**arguments, "prompt": None}


def test_the_noise_of_a_one_step_model_is_optimized_until_the_policy_allows() -> None:
    pipe, encoder = _turbo(), LinearEncoder("sdxl", 4)
    arguments = _one_step()
    first = optimize_noise(pipe, policy=policy(), model=encoder, iterations=0, **arguments)
    start = float(first.verdicts[0].concepts[0].margin)
    probability = 1 / (1 + torch.tensor(-10 * (start - 0.1)).exp().item())
    rule = policy(round(probability, 4))
    assert Scorer(rule, encoder).verdicts(first.latents)[0].decision == "block"
    found = optimize_noise(pipe, policy=rule, model=encoder, learning_rate=50.0, **arguments)
    assert found.verdicts[0].decision == "allow"
    assert float(found.reward) == 0 > float(found.rewards[0])
    # The noise gives these latents in an ordinary call too, with the same seed.
    arguments.pop("prompt")
    again = pipe(
        **arguments,
        latents=found.noise,
        generator=torch.Generator().manual_seed(found.seed),
        output_type="latent",
    ).images
    torch.testing.assert_close(again, found.latents.tensor, atol=1e-5, rtol=1e-4)
    # The regularizer keeps the norm near that of Gaussian noise.
    assert found.noise.norm() == pytest.approx(found.noise.numel() ** 0.5, rel=0.2)
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_a_reward_of_ones_own_is_raised() -> None:
    pipe, encoder = _turbo(), LinearEncoder("sdxl", 4)
    target = encoder.encode_text(["a lighthouse"])[0]

    def reward(latents: Latents) -> torch.Tensor:
        return 100 * (encoder.encode_latents(latents) @ target)

    found = optimize_noise(
        pipe,
        policy=policy(),
        reward=reward,
        model=encoder,
        iterations=12,
        learning_rate=50.0,
        **_one_step(),
    )
    assert found.rewards.shape == (13, 1)
    assert float(found.reward) == float(found.rewards.max())
    assert float(found.reward) > float(found.rewards[0]) + 1


def test_agreement_with_the_prompt_rises() -> None:
    pipe, encoder = _turbo(), LinearEncoder("sdxl", 4)
    found = optimize_noise(
        pipe,
        **{**_one_step(), "prompt": "a lighthouse"},
        policy=policy(),
        model=encoder,
        agreement=1.0,
        iterations=15,
    )
    text = encoder.encode_text(["a lighthouse"])[0]
    cosine = (encoder.encode_latents(found.latents) @ text).item()
    assert found.reward.item() == pytest.approx(encoder.logit_scale * cosine, rel=1e-4)
    assert found.reward.item() > found.rewards[0].item() + 0.5


def test_a_concept_outweighs_the_prompt_that_names_it() -> None:
    """Both rewards at once: the prompt asks for what the policy forbids."""
    pipe, encoder = _turbo(), LinearEncoder("sdxl", 4)
    options = {**_one_step(), "prompt": "revolver"}
    rule = policy(0.5)
    free = optimize_noise(pipe, **options, policy=policy(), model=encoder, agreement=1.0)
    assert Scorer(rule, encoder).verdicts(free.latents)[0].decision == "block"
    held = optimize_noise(pipe, **options, policy=rule, model=encoder, agreement=0.1)
    assert held.verdicts[0].decision == "allow"


def test_the_first_step_is_the_published_one() -> None:
    """SGD at 5 with Nesterov momentum 0.9 of a gradient clipped at 0.1: 5 x 1.9 x 0.1 long."""
    pipe, encoder = _turbo(), LinearEncoder("sdxl", 4)
    seen: list[torch.Tensor] = []

    def reward(latents: Latents) -> torch.Tensor:
        seen.append(latents.tensor.detach())
        return 1000 * latents.tensor.flatten(1).mean(1)

    options = {**_one_step(), "policy": policy(), "model": encoder, "reward": reward}
    start = optimize_noise(pipe, **options, iterations=0)
    moved = optimize_noise(pipe, **options, iterations=1, noise=start.noise)
    assert moved.rewards.shape == (2, 1)
    assert moved.rewards[1] > moved.rewards[0]
    length = (moved.noise - start.noise).norm().item()
    assert length == pytest.approx(5 * 1.9 * 0.1, rel=1e-3)


def test_the_regularizer_pulls_the_norm_to_that_of_noise() -> None:
    """0.01 x (0.5 r^2 - (d - 1) log r) has its minimum at r = sqrt(d - 1)."""
    pipe, encoder = _turbo(), LinearEncoder("sdxl", 4)
    flat = {"policy": policy(), "model": encoder, **_one_step()}

    def reward(latents: Latents) -> torch.Tensor:
        # Grows by iteration whatever the noise is: the last iterate is the best.
        calls.append(0)
        return 0 * latents.tensor.flatten(1).sum(1) + len(calls)

    calls: list[int] = []
    first = optimize_noise(pipe, **flat, iterations=0)
    wanted = (first.noise.numel() - 1) ** 0.5
    for factor in (0.9, 1.1):
        noise = first.noise * (factor * wanted / first.noise.norm())
        found = optimize_noise(pipe, **flat, reward=reward, noise=noise, iterations=8)
        before, after = abs(noise.norm() - wanted), abs(found.noise.norm() - wanted)
        assert after < before


def test_a_batch_of_prompts_gets_as_many_noises() -> None:
    pipe, encoder = _turbo(), LinearEncoder("sdxl", 4)
    arguments = small.sdxl_arguments(batch=3, steps=1, guidance_scale=0.0)
    for name in ("generator", "output_type"):
        del arguments[name]
    found = optimize_noise(
        pipe, None, policy(), model=encoder, iterations=1, agreement=0.0, **arguments
    )
    assert len(found.noise) == len(found.verdicts) == 3


def test_what_cannot_be_optimized_is_an_error() -> None:
    pipe, encoder = _turbo(), LinearEncoder("sdxl", 4)
    with pytest.raises(LatentsError, match="agreement needs one prompt, given as text"):
        optimize_noise(pipe, policy=policy(), model=encoder, agreement=1.0, **_one_step())
    with pytest.raises(ValueError, match="iterations must be at or above 0, got -1"):
        optimize_noise(pipe, policy=policy(), model=encoder, iterations=-1, **_one_step())
