"""A scheduler's step is seen however a subclass passes on to it, and whatever ran before."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
)
from guard_helpers import NEVER, policy
from guard_traps import XL

from latentguard import LatentGuard

STEPS = 4
SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
]
# One that works with timesteps, one that converts, one whose variance explodes.
QUICK = {DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler}
EACH = [pytest.param(base, marks=() if base in QUICK else pytest.mark.slow) for base in SCHEDULERS]


def fresh(base: Any) -> Any:
    """A class like `base` that no guard has ever seen."""
    return type(base.__name__, (base,), {"step": inspect.unwrap(base.step)})


def by_super(base: Any) -> Any:
    class Sub(base):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    return Sub


def by_two(base: Any) -> Any:
    return by_super(by_super(base))


def by_function(base: Any) -> Any:
    """Its step is set later, about the one that was there."""

    class Sub(base):  # type: ignore[misc]
        pass

    before = Sub.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return before(self, *args, **kwargs)

    Sub.step = step  # type: ignore[method-assign]
    return Sub


def named(base: Any) -> Any:
    class Sub(base):  # type: ignore[misc]
        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            return super().step(model_output, timestep, sample, **kwargs)

    return Sub


def partly_named(base: Any) -> Any:
    class Sub(base):  # type: ignore[misc]
        def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output, *args, **kwargs)

    return Sub


def run(scheduler: Any, guard: LatentGuard | None) -> Any:
    pipe = small.sdxl(scheduler=scheduler)
    pipe.callback_on_step_end = guard
    torch.manual_seed(0)  # a step of *args is given no generator
    return pipe(**small.sdxl_arguments(steps=STEPS)).images


def told(guard: LatentGuard) -> list[Any]:
    return [
        (record.estimate_source, record.noise_level, record.verdicts[0].concepts[0].margin)  # type: ignore[union-attr]
        for record in guard.history
    ]


@pytest.mark.parametrize("base", EACH)
@pytest.mark.parametrize("way", [by_super, by_two, by_function, named, partly_named])
def test_a_step_that_a_subclass_passes_on(base: Any, way: Any) -> None:
    """The same in a process that has seen no such class, and after its parents were guarded."""
    parent = fresh(base)
    cls = way(parent)
    images = run(cls(**small.BETAS), None)
    first, second = (LatentGuard(policy(NEVER, action="observe"), XL) for _ in range(2))
    assert np.array_equal(run(cls(**small.BETAS), first), images)
    run(parent(**small.BETAS), LatentGuard(policy(NEVER), XL))
    assert np.array_equal(run(cls(**small.BETAS), second), images)
    assert told(first) == told(second)
    assert "consecutive" not in [record.estimate_source for record in first.history]
    assert first.verdicts[0].decision == "allow"


def test_the_outermost_named_step_is_the_one_that_counts() -> None:
    class Halved(fresh(EulerDiscreteScheduler)):  # type: ignore[misc]
        """Steps from another prediction than the one that it is given."""

        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            return super().step(model_output / 2, timestep, sample, **kwargs)

    guard = LatentGuard(policy(NEVER, action="observe"), XL)
    pipe = small.sdxl(scheduler=Halved(**small.BETAS))
    pipe.callback_on_step_end = guard
    pipe(**small.sdxl_arguments(steps=3))
    assert [record.estimate_source for record in guard.history] == ["scheduler"] * 2 + ["latents"]
    assert guard.history[-1].final


def test_a_step_of_another_form_leaves_its_parents_to_be_seen() -> None:
    class Other(fresh(EulerDiscreteScheduler)):  # type: ignore[misc]
        def step(self, output: Any, t: Any, x: Any, **kwargs: Any) -> Any:
            return super().step(output, t, x, **kwargs)

    guard = LatentGuard(policy(NEVER, action="observe"), XL)
    run(Other(**small.BETAS), guard)
    assert [record.estimate_source for record in guard.history] == ["scheduler"] * 3 + ["latents"]
