"""A guard whose concept was learned from examples: on a generation whose outcome is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
from learned import NANO, is_gun, photos, write_policy

from latentguard import LatentGuard, Scorer
from latentguard.evaluate.exact import exact_sdxl_pipeline, prompt
from latentguard.guard.steering import RELEASE, Steerer
from latentguard.spaces import Latents


def test_a_guard_blocks_what_looks_like_the_examples(tmp_path: Path) -> None:
    latents = photos()
    labels = ["gun" if gun else "other" for gun in is_gun(latents)]
    pipe = exact_sdxl_pipeline(latents, labels)
    pipe.set_progress_bar_config(disable=True)
    guard = LatentGuard(write_policy(tmp_path), NANO, space="flux2")
    images = pipe(
        **prompt(pipe, ["gun", "gun", "other"], leak=0.0),
        height=256,
        width=256,
        num_inference_steps=8,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=guard,
    ).images
    assert [verdict.decision for verdict in guard.verdicts][:2] == ["block", "block"]
    assert guard.verdicts[2].decision != "block"
    assert [bool(image.any()) for image in images] == [False, False, True]
    assert "'handguns' matched 'examples of handguns'" in guard.verdicts[0].reason


def test_steering_goes_down_the_head_s_gradient(tmp_path: Path) -> None:
    latents = photos()
    x0 = latents.pick([i for i, gun in enumerate(is_gun(latents)) if gun][:2])
    extra = "steer: {iterations: 12}"
    path = write_policy(tmp_path, action=f"steer\n    {extra}")
    scorer = Scorer(path, NANO)
    noise = torch.randn(x0.tensor.shape, generator=torch.Generator().manual_seed(0))
    noisy = Latents(x0.tensor + 2 * noise, "flux2", scaled=True)
    _, records = Steerer(scorer)(noisy, x0, [{"handguns"}] * 2, 2.0, 1.0)
    for record in records:
        assert record is not None
        assert record.reached
        assert record.before > 0
        assert record.after <= -RELEASE / NANO.logit_scale
