"""Where nothing is steered, the encoder's first operator makes the x0 estimate and unscales it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from guard_helpers import NEVER, policy
from guard_pipelines import BETAS, sdxl, sdxl_arguments

from latentguard import LatentGuard, Latents
from latentguard.encoders import Features
from latentguard.encoders.catalog import LatentClipConfig
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.errors import LatentsError
from latentguard.spaces import Prediction

SMALL = LatentClipConfig(8, 64, 64, 64, width=64, layers=1, text_layers=1)
NAMES = ("latents", "noise", "alpha", "sigma", "scale", "shift")


class Watched(LatentCLIP):
    """Remembers which tensors it was given."""

    given: list[set[str]]

    def features(self, *args: Any, **options: Any) -> Features:
        if isinstance(self.given, list):
            pairs = zip(NAMES, args, strict=False)
            self.given.append({name for name, value in pairs if value is not None})
        return super().features(*args, **options)


def run(
    scheduler: Any, action: str = "block", unscales: bool = True, **more: Any
) -> tuple[LatentGuard, list[set[str]]]:
    encoder = Watched.random(SMALL)
    encoder.given, encoder.unscales = [], unscales
    pipe = sdxl(scheduler=scheduler)
    guard = LatentGuard(policy(NEVER, action=action), encoder)
    pipe.callback_on_step_end = guard
    pipe(**sdxl_arguments(**more))
    return guard, encoder.given


def margins(guard: LatentGuard) -> list[float]:
    return [v.concepts[0].margin for r in guard.history for v in r.verdicts if v is not None]


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, DDIMScheduler])
def test_the_estimate_is_made_on_the_way(solver: Any) -> None:
    fused, given = run(solver(**BETAS))
    before, plain = run(solver(**BETAS), unscales=False)
    assert plain == [{"latents"}] * 4
    # DDIM says its own x0. The last latents are judged as they are.
    way = set(NAMES) if solver is DPMSolverMultistepScheduler else {"latents", "scale", "shift"}
    assert given == [way] * 3 + [{"latents", "scale", "shift"}]
    # Cosines in float32.
    assert margins(fused) == pytest.approx(margins(before), abs=1e-5)


@pytest.mark.parametrize("why", ["steered", "changed by a callback"])
def test_x0_is_computed_where_more_is_done_with_it(why: str) -> None:
    def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        return tensors

    more = {} if why == "steered" else {"callback_on_step_end": callback}
    action = "steer" if why == "steered" else "block"
    _, given = run(DPMSolverMultistepScheduler(**BETAS), action, **more)
    assert all(names == {"latents", "scale", "shift"} for names in given)


def test_a_prediction_is_its_x0() -> None:
    noisy = Latents(torch.randn(3, 4, 8, 8, dtype=torch.float16), "sdxl", scaled=True)
    noise = torch.randn(3, 4, 8, 8, dtype=torch.float16)
    prediction = Prediction(noisy, noise, 0.5, 0.75)
    want = (noisy.tensor.double() - 0.75 * noise.double()) / 0.5
    assert prediction.x0().tensor.dtype == torch.float16
    torch.testing.assert_close(prediction.x0().tensor.double(), want, atol=5e-3, rtol=1e-3)
    some = prediction.pick([2, 0])
    assert len(some) == 2
    torch.testing.assert_close(some.x0().tensor, prediction.x0().tensor[[2, 0]])
    with pytest.raises(LatentsError, match="shape of the latents"):
        Prediction(noisy, noise[:2], 1.0, 1.0)
    with pytest.raises(LatentsError, match="alpha must be above 0, got 0"):
        Prediction(noisy, noise, 0.0, 1.0)


def test_euler_tells_its_own_estimate() -> None:
    _, given = run(EulerDiscreteScheduler(**BETAS))
    assert all(names == {"latents", "scale", "shift"} for names in given)
