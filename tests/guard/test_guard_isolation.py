"""Requests side by side: every one gets what it would have got alone, to the last bit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from latentguard import Latents, Policy, Scorer, load_encoder
from latentguard.files import load_latents
from latentguard.guard import Session
from latentguard.policy import parse_policy

LEVELS = (1.5, 0.2, 0.0)


def rule(name: str, action: str) -> Policy:
    """Some of the pictures match each of these, and some none."""
    steer = "steer: {iterations: 1}" if action == "steer" else ""
    return parse_policy(
        f"""
schema_version: 1
name: {name}
version: "1"
contrast: [dog, house, landscape, flower]
schedule: {{every: {1 if action == "block" else 2}}}
concepts:
  - id: guns
    category: weapons
    prompts: [revolver]
    threshold: {{probability: 0.5}}
    action: {action}
    {steer}
  - id: drinks
    category: alcohol
    prompts: [beer glass, wine bottle]
    threshold: {{probability: 0.5}}
    action: block
  - id: cats
    category: animals
    prompts: [cat]
    threshold: {{probability: 0.5}}
    action: review
""".encode(),
        "test.yaml",
    )


@pytest.fixture(scope="module")
def pictures() -> Latents:
    path = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"
    return load_latents(path).to(dtype=torch.float32)


@pytest.fixture(scope="module")
def scorers() -> list[Scorer]:
    """Of two tenants: policies of their own, and one encoder."""
    encoder = load_encoder("nano-flux2", "cpu")
    return [Scorer(rule(name, act), encoder) for name, act in (("a", "block"), ("b", "steer"))]


def request(number: int, scorer: Scorer, pictures: Latents, pause: Any = None) -> dict[str, Any]:
    """One request of one or two pictures, denoised in three steps."""
    count = 1 + number % 2
    rows = [(7 * number + i) % len(pictures) for i in range(count)]
    clean = Latents(pictures.tensor[rows], pictures.space, True)
    generator = torch.Generator().manual_seed(number)
    session = Session(scorer, f"request-{number}")
    for level in LEVELS:
        noise = torch.randn(clean.tensor.shape, generator=generator)
        noisy = Latents(clean.tensor + level * noise, pictures.space, True)
        x0 = Latents(clean.tensor + 0.3 * level * noise, pictures.space, True)
        if pause is not None:
            pause()
        result = session.step(noisy, x0, noise_level=level, final=level == 0)
    data = session.to_dict()
    for record in data["history"]:
        del record["seconds"]
    return {**data, "latents": result.latents.tensor}


@pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_sessions_at_once_are_sessions_one_after_another(
    count: int, pictures: Latents, scorers: list[Scorer]
) -> None:
    numbers = range(9, 9 + count)  # of these a dozen have every outcome
    alone = [request(i, scorers[i % 2], pictures) for i in numbers]
    together = threading.Barrier(count)  # all have begun before any goes on

    def run(number: int) -> dict[str, Any]:
        together.wait()
        return request(number, scorers[number % 2], pictures)

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(run, numbers))
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one.pop("latents"), other.pop("latents"))
        assert one == other
    decisions = [verdict["decision"] for one in alone for verdict in one["verdicts"]]
    assert {"allow", "review", "block"} <= set(decisions)
    actions = [
        image["action"] for one in alone for step in one["history"] for image in step["images"]
    ]
    assert {"none", "steered", "blocked", "already blocked"} <= set(actions)


def test_sessions_that_take_turns(pictures: Latents, scorers: list[Scorer]) -> None:
    """Step by step in one thread's time: each waits for all the others before its next step."""
    count = 6
    alone = [request(i, scorers[i % 2], pictures) for i in range(count)]
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        found = list(
            pool.map(lambda i: request(i, scorers[i % 2], pictures, barrier.wait), range(count))
        )
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one.pop("latents"), other.pop("latents"))
        assert one == other


@pytest.mark.parametrize("shared", [True, False], ids=["one guard", "two guards"])
def test_guards_in_threads_on_pipelines_of_their_own(shared: bool) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    import guard_pipelines as small

    from latentguard import LatentGuard

    encoder = load_encoder("nano-sdxl", "cpu")
    pipes = [small.sdxl(), small.sdxl()]
    seeds = [range(2), range(10, 12)]

    def guards() -> list[LatentGuard]:
        first = LatentGuard(rule("a", "block"), encoder)
        return [first, first if shared else LatentGuard(rule("b", "steer"), encoder)]

    def run(which: int, guard: LatentGuard) -> list[Any]:
        pipe, found = pipes[which], []
        pipe.callback_on_step_end = guard
        for seed in seeds[which]:
            arguments = small.sdxl_arguments(2, seed=seed, output_type="latent")
            latents = pipe(**arguments).images
            history = [record.to_dict() | {"seconds": 0} for record in guard.history]
            found.append((latents, guard.verdicts, history))
        return found

    alone = [run(i, guard) for i, guard in enumerate(guards())]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2), guards()))
    for one, other in zip(alone, found, strict=True):
        for before, after in zip(one, other, strict=True):
            assert torch.equal(before[0], after[0])
            assert before[1:] == after[1:]
