"""The sampler guard in a loop of the tests' own; test_in_comfyui.py runs ComfyUI's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_pictures import policy_file, raw
from latentguard_comfyui.loaded import Loaded
from latentguard_comfyui.sampling import SamplerGuard, noise_level
from latentguard_comfyui.told import BlockedError
from test_comfyui_conventions import format_of

from latentguard import GuardError, Latents, load_policy
from latentguard.guard import Session

SIGMAS = torch.tensor([14.6, 6.0, 2.5, 1.0, 0.4, 0.0])


class Eps:
    """x = x0 + sigma * noise."""

    def noise_scaling(self, sigma: Any, noise: Any, latent: Any, full: bool = False) -> Any:
        return noise * sigma + latent


class Flow:
    """x = (1 - sigma) * x0 + sigma * noise."""

    def noise_scaling(self, sigma: Any, noise: Any, latent: Any, full: bool = False) -> Any:
        return sigma * noise + (1 - sigma) * latent


def loaded(folder: Path, action: str = "block", threshold: float = 0.5) -> Loaded:
    return Loaded(load_policy(policy_file(folder, action, threshold)), "auto", "cpu")


def scaled(*names: str) -> torch.Tensor:
    return Latents(raw("sdxl", *names), "sdxl", scaled=False).to_scaled().tensor


def follows(target: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The exact denoiser of pictures that scatter around a target: it follows where x goes."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        share = (sigma**2).view(-1, 1, 1, 1)
        return (x + target * share) / (1 + share)

    return denoise


class Loop:
    """An Euler loop with the guard's wrappers around sampler and prediction."""

    def __init__(self, guard: SamplerGuard | None, denoise: Any) -> None:
        self.guard, self.denoise, self.calls = guard, denoise, 0
        self.model = SimpleNamespace(latent_format=format_of("SDXL"), model_sampling=Eps())

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, *_: Any) -> torch.Tensor:
        self.calls += 1
        return self.denoise(x, sigma)

    def euler(self, wrap: Any, sigmas: Any, extra: Any, callback: Any, x: Any, *_: Any) -> Any:
        for sigma, after in pairwise(sigmas):
            at = sigma.repeat(len(x))
            if self.guard is None:
                x0 = self.predict(x, at)
            else:
                x0 = self.guard.predict(self.predict, x, at)
            x = x0 + (x - x0) * (after / sigma)
        return x

    @torch.inference_mode()
    def run(
        self, count: int, sigmas: torch.Tensor = SIGMAS, callback: Any = None, **inpaint: Any
    ) -> torch.Tensor:
        wrap = SimpleNamespace(inner_model=self.model)
        torch.manual_seed(0)
        noise = torch.randn(count, 4, 32, 32) * sigmas[0]
        if self.guard is None:
            return self.euler(wrap, sigmas, {}, None, noise)
        return self.guard.sample(self.euler, wrap, sigmas, {}, callback, noise, **inpaint)


def run(guard: SamplerGuard | None, *names: str, **options: Any) -> tuple[torch.Tensor, int]:
    loop = Loop(guard, follows(scaled(*names)))
    return loop.run(len(names), **options), loop.calls


def test_what_is_allowed_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    expected, calls = run(None, "cat", "pagoda")
    found, same = run(SamplerGuard(loaded(tmp_path), "stop"), "cat", "pagoda")
    assert torch.equal(found, expected)
    assert calls == same == len(SIGMAS) - 1


def test_a_blocked_image_is_blank_and_the_others_are_kept(tmp_path: Path) -> None:
    expected, _ = run(None, "cat", "revolver")
    found, _ = run(SamplerGuard(loaded(tmp_path), "blank"), "cat", "revolver")
    assert torch.equal(found[0], expected[0])
    assert not found[1].any()


def test_nothing_more_is_computed_when_all_is_blocked(tmp_path: Path) -> None:
    found, calls = run(SamplerGuard(loaded(tmp_path), "blank"), "revolver", "revolver-dark")
    assert not found.any()
    assert calls < len(SIGMAS) - 1


def test_previews_and_kept_predictions_are_blank_too(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        kept.update(step=step, x0=x0, total=total)

    loop = Loop(SamplerGuard(loaded(tmp_path), "blank"), follows(scaled("cat", "revolver")))
    loop.euler = (
        lambda *given: (  # type: ignore[method-assign]
            loop.guard.predict(loop.predict, given[4], SIGMAS[:1]),
            given[4],
        )[1]
    )
    loop.run(2, callback=callback)
    assert kept["step"] + 1 == kept["total"] == len(SIGMAS) - 1
    assert not kept["x0"][1].any()
    loop = Loop(SamplerGuard(loaded(tmp_path), "blank"), follows(scaled("revolver")))
    loop.run(1, callback=callback)
    assert not kept["x0"].any()


def test_stop_says_what_matched(tmp_path: Path) -> None:
    with pytest.raises(BlockedError) as stopped:
        run(SamplerGuard(loaded(tmp_path), "stop"), "cat", "revolver")
    assert "image 1: block: concept 'guns' matched 'revolver'" in str(stopped.value)
    assert "image 0" not in str(stopped.value)


def test_what_shows_only_at_the_end_is_blocked(tmp_path: Path) -> None:
    gun, cat = scaled("revolver"), scaled("cat")

    def turns(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return gun if float(sigma.max()) < 0.5 else cat

    found = Loop(SamplerGuard(loaded(tmp_path), "blank"), turns).run(1)
    assert not found.any()


def test_what_a_sampler_gives_besides_its_predictions_is_judged(tmp_path: Path) -> None:
    loop = Loop(SamplerGuard(loaded(tmp_path), "blank"), follows(scaled("cat")))
    loop.euler = lambda *_: scaled("revolver")  # type: ignore[method-assign]
    assert not loop.run(1).any()


def test_noise_that_is_left_is_judged_by_the_last_prediction(tmp_path: Path) -> None:
    noisy = SIGMAS[:-1]
    expected, _ = run(None, "cat", sigmas=noisy)
    found, _ = run(SamplerGuard(loaded(tmp_path), "blank"), "cat", sigmas=noisy)
    assert torch.equal(found, expected)
    found, _ = run(SamplerGuard(loaded(tmp_path), "blank"), "revolver", "cat", sigmas=noisy)
    assert not found[0].any()
    assert found[1].any()


def test_a_sampler_that_predicts_nothing_is_blocked(tmp_path: Path) -> None:
    found, _ = run(SamplerGuard(loaded(tmp_path), "blank"), "cat", sigmas=SIGMAS[:1])
    assert not found.any()


def test_steering_moves_an_image_away_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Session] = []
    made = Session.__init__
    monkeypatch.setattr(
        Session, "__init__", lambda self, *a, **k: (made(self, *a, **k), sessions.append(self))[0]
    )
    expected, _ = run(None, "cat", "revolver")
    guard = SamplerGuard(loaded(tmp_path, "steer"), "blank")
    found, calls = run(guard, "cat", "revolver")
    assert calls == len(SIGMAS) - 1
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])
    steps = [record for record in sessions[0].history if record.actions[1] == "steered"]
    assert steps
    assert steps[-1].steering[1].reached
    assert found[1].any()
    scorer = loaded(tmp_path).scorer("sdxl")
    assert scorer.verdicts(Latents(found, "sdxl", scaled=True))[1].decision == "allow"


def test_inpainting_is_judged_as_it_is_composed(tmp_path: Path) -> None:
    keep = scaled("cat")
    loop = Loop(SamplerGuard(loaded(tmp_path), "blank"), follows(scaled("revolver")))
    loop.euler = lambda wrap, sigmas, *_: (  # type: ignore[method-assign]
        loop.guard.predict(loop.predict, keep, sigmas[2].reshape(1)),
        keep,
    )[1]
    found = loop.run(1, latent_image=keep, denoise_mask=torch.zeros(1, 1, 32, 32))
    assert torch.equal(found, keep)


def test_a_model_that_cannot_be_read_stops(tmp_path: Path) -> None:
    loop = Loop(SamplerGuard(loaded(tmp_path), "blank"), follows(scaled("cat")))
    loop.model.latent_format = format_of("SC_B")
    with pytest.raises(ValueError, match="latent format SC_B is not known"):
        loop.run(1)


def test_numbers_that_cannot_be_judged_are_blocked(tmp_path: Path) -> None:
    guard = SamplerGuard(loaded(tmp_path), "blank")
    assert not Loop(guard, lambda x, sigma: x * torch.nan).run(1).any()


def test_a_model_that_is_called_outside_of_a_sampler_is_an_error(tmp_path: Path) -> None:
    guard = SamplerGuard(loaded(tmp_path), "blank")
    with pytest.raises(GuardError, match="outside of a sampler"):
        guard.predict(lambda x, *_: x, torch.zeros(1, 4, 8, 8), torch.ones(1))


def test_two_guards_on_one_model_both_judge(tmp_path: Path) -> None:
    inner = SamplerGuard(loaded(tmp_path), "blank")
    outer = SamplerGuard(loaded(tmp_path, threshold=0.999999), "blank")
    loop = Loop(outer, follows(scaled("revolver")))
    loop.predict = (lambda p: lambda x, s, *_: inner.predict(p, x, s))(loop.predict)
    euler = loop.euler
    loop.euler = lambda *given: inner.sample(euler, *given)  # type: ignore[method-assign]
    assert not loop.run(1).any()


def test_noise_levels_are_the_models_own() -> None:
    sigma = torch.tensor([0.75, 0.75])
    assert noise_level(Eps(), sigma) == pytest.approx(0.75)
    assert noise_level(Flow(), sigma) == pytest.approx(3.0)
    assert noise_level(Flow(), torch.ones(1)) == float("inf")
