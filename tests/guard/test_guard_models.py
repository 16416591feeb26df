"""Models in a guard that are not just called: compiled encoders, and cascades of two."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy
from guard_traps import XL

from latentguard import LatentGuard
from latentguard.encoders import Features
from latentguard.policy import Policy

RARELY, MOSTLY = 0.999, 0.001
"""Probabilities with finite margins, which a first model can be unsure of."""
ONCE = "steer: {iterations: 1}"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler",
)


class Pure(LinearEncoder):
    """Counts no calls, and so is one graph."""

    def features(self, latents: torch.Tensor, *args: Any) -> Features:
        pooled = latents.float().unflatten(2, (4, -1)).unflatten(4, (4, -1)).mean((3, 5))
        pooled = pooled.flatten(1) @ self._weight.T
        return Features(pooled, pooled[:, None], (1, 1))


# The graphs are made in a moment, and compiled in many; aot_eager runs them as they are.
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])]
)
@pytest.mark.parametrize("action", ["block", "steer"])
def test_a_compiled_encoder_judges_and_steers_as_an_eager_one(
    action: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    if backend != "inductor":
        compiled = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **_: compiled(f, backend=backend))
    found = []
    for mode in (None, "default"):
        rule = policy(ALWAYS, action, concept=ONCE) if action == "steer" else policy(NEVER)
        guard = LatentGuard(rule, Pure("sdxl", 4), compile=mode)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        pipe = small.sdxl()
        pipe.callback_on_step_end = guard
        latents = pipe(**small.sdxl_arguments(2, output_type="latent")).images
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert (graphs > 0) == (mode is not None)
        scores = [v.concepts[0].margin for record in guard.history for v in record.verdicts if v]
        actions = [record.actions for record in guard.history]
        found.append((scores, actions, latents))
    (scores, actions, latents), (other, same_actions, same_latents) = found
    assert other == pytest.approx(scores, abs=1e-4)
    assert actions == same_actions
    torch.testing.assert_close(latents, same_latents, atol=1e-3, rtol=1e-3)
    assert actions[0] == (("steered",) * 2 if action == "steer" else ("none",) * 2)


def test_a_mode_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"compile must be None or one of default, .*got 'fastest'"
    ):
        LatentGuard(policy(), XL, compile="fastest")


# -- cascades ----------------------------------------------------------------------------------


def cascade(unsure: float, threshold: float, action: str = "block") -> Policy:
    extra = f"cascade: {{first: nano-flux2, unsure: {unsure}}}"
    return policy(threshold, action, extra=extra, concept=ONCE if action == "steer" else "")


def run(guard: LatentGuard) -> Any:
    pipe = small.flux2()
    pipe.callback_on_step_end = guard
    return pipe(**small.flux2_arguments(2)).images


def margins(guard: LatentGuard) -> list[list[float]]:
    return [[v.concepts[0].margin for v in record.verdicts if v] for record in guard.history]


def test_a_first_model_that_is_sure_is_all_that_is_asked() -> None:
    second = LinearEncoder("flux2", 32)
    guard, alone = (
        LatentGuard(cascade(0.0, RARELY), second),
        LatentGuard(policy(RARELY), "nano-flux2"),
    )
    assert run(guard).any()
    assert second.calls == 0
    run(alone)
    for found, given in zip(margins(guard), margins(alone), strict=True):
        assert found == pytest.approx(given, abs=1e-6)
    assert all(verdict.reason.endswith("of the cascade)") for verdict in guard.verdicts)


def test_a_first_model_that_is_unsure_leaves_it_to_the_second() -> None:
    second = LinearEncoder("flux2", 32)
    guard, alone = LatentGuard(cascade(2.0, RARELY), second), LatentGuard(policy(RARELY), second)
    run(guard)
    assert second.calls == 4  # each step, both images at once
    run(alone)
    assert guard.verdicts == alone.verdicts


def test_a_cascade_blocks_by_its_first_model() -> None:
    """Without having asked the second."""
    second = LinearEncoder("flux2", 32)
    guard = LatentGuard(cascade(0.0, MOSTLY), second)
    assert not run(guard).any()
    assert second.calls == 0
    assert len(guard.history) == 1
    assert guard.verdicts[0].reason.startswith("block: concept 'guns' matched 'revolver'")


def test_a_cascade_steers_by_its_second_model() -> None:
    second = LinearEncoder("flux2", 32)
    guard = LatentGuard(cascade(2.0, MOSTLY, "steer"), second)
    run(guard)
    assert guard.history[0].actions == ("steered",) * 2
    # Margins of the second model. Later pushes of this random one may overshoot.
    assert all(one is not None and one.after < one.before for one in guard.history[0].steering)
    assert second.calls > len(guard.history)


def test_a_first_model_that_fails_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = LatentGuard(cascade(0.0, RARELY), LinearEncoder("flux2", 32))
    pipe = small.flux2()
    pipe.callback_on_step_end = guard
    first = next(iter(guard._scorers.values())).first
    assert first is not None

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(first, "_features", fails)
    assert not pipe(**small.flux2_arguments(2)).images.any()
    assert "out of memory" in (guard.verdicts[0].error or "")
