"""A batch of which some images are blocked or steered: the others keep every bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from guard_helpers import LinearEncoder, policy

from latentguard import LatentGuard

BATCH = 4
SPACES = {"sd1": 4, "sdxl": 4, "sd3": 16, "flux1": 16, "flux2": 32}
ENCODERS = {name: LinearEncoder(name, channels) for name, channels in SPACES.items()}
KINDS = {
    "sdxl": "sdxl",
    "img2img": "sdxl",
    "inpaint": "sdxl",
    "sd1": "sd1",
    "lcm": "sd1",
    "sd3": "sd3",
    "flux": "flux1",
    "flux2": "flux2",
}


def pipeline(kind: str, scheduler: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    pipe = getattr(small, kind)()
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe.to(dtype=dtype)


def arguments(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    image = torch.rand(BATCH, 3, small.SIZE, small.SIZE, generator=torch.Generator().manual_seed(3))
    if kind == "img2img":
        more = {**more, "image": image, "strength": 0.8, "num_inference_steps": 6}
    elif kind == "inpaint":
        more = {
            **more,
            "image": image,
            "mask_image": torch.ones(BATCH, 1, small.SIZE, small.SIZE),
            "strength": 0.9,
            "height": small.SIZE,
            "width": small.SIZE,
        }
    make = "sdxl" if kind in ("img2img", "inpaint") else kind
    found = getattr(small, f"{make}_arguments")(BATCH, **more)
    half = lambda v: isinstance(v, torch.Tensor) and v.dtype == torch.float32  # noqa: E731
    return {name: value.to(dtype) if half(value) else value for name, value in found.items()}


def check(
    kind: str,
    pipe: Any,
    asked: Any,
    action: str = "block",
    step: int = 1,
) -> None:
    """Flag two of four images at one step, and compare the others with a run without a guard."""
    encoder = ENCODERS[KINDS[kind]]
    plain = pipe(**asked()).images
    probe = LatentGuard(policy(action="observe"), encoder)
    pipe(**asked(), callback_on_step_end=probe)
    record = probe.history[step]
    margins = [v.concepts[0].margin for v in record.verdicts if v is not None]
    middle = sum(sorted(margins)[1:3]) / 2
    level = record.noise_level
    rule = policy(action=action, concept=f"noise_window: [{level * 0.99}, {level * 1.01}]")
    concept = rule.concepts[0]
    threshold = type(concept.threshold)(margin=middle)
    rule = rule.model_copy(
        update={"concepts": (concept.model_copy(update={"threshold": threshold}),)}
    )
    guard = LatentGuard(rule, encoder)
    pipe.callback_on_step_end = guard
    found = pipe(**asked()).images
    at_step = guard.history[step].actions
    did = "blocked" if action == "block" else "steered"
    assert sorted(at_step) == sorted([did, did, "none", "none"])
    for i in range(BATCH):
        blocked = guard.verdicts[i].decision == "block"
        touched = any(record.actions[i] == "steered" for record in guard.history)
        if blocked:
            assert not found[i].any()
        elif touched:
            assert not np.array_equal(found[i], plain[i])
        else:
            assert np.array_equal(found[i], plain[i])
            assert found[i].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ["block", "steer"])
def test_on_every_pipeline(kind: str, action: str) -> None:
    check(kind, pipeline(kind), lambda: arguments(kind), action)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "flux2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    check(kind, pipeline(kind, dtype=dtype), lambda: arguments(kind, dtype))


@pytest.mark.parametrize(
    ("kind", "scale"), [("sdxl", 0.0), ("sdxl", 5.0), ("sd3", 1.0), ("flux", 0.0), ("sd1", 1.0)]
)
def test_with_guidance_off_and_on(kind: str, scale: float) -> None:
    check(kind, pipeline(kind), lambda: arguments(kind, guidance_scale=scale))


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerAncestralDiscreteScheduler,  # gives its x0 prediction
        HeunDiscreteScheduler,
        LCMScheduler,
        UniPCMultistepScheduler,  # does not
        PNDMScheduler,
    ],
)
def test_with_schedulers_that_give_x0_and_that_do_not(scheduler: Any) -> None:
    pipe = pipeline("sdxl", scheduler(**small.BETAS))
    check("sdxl", pipe, lambda: arguments("sdxl"))


def test_with_components_that_are_offloaded() -> None:
    pipe = pipeline("sdxl")
    pipe.enable_model_cpu_offload(device="cpu")
    check("sdxl", pipe, lambda: arguments("sdxl"))
    assert hasattr(pipe.vae, "_hf_hook")
