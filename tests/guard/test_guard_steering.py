"""Steering on generations whose outcome is known, and the noise search for few-step models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from guard_helpers import ALWAYS, policy

from latentguard import LatentGuard, Latents, Scorer, load_encoder
from latentguard.evaluate.exact import exact_sdxl_pipeline, outcome, prompt
from latentguard.files import load_latents
from latentguard.guard.steering import SLACK, Steerer
from latentguard.verdict import resolve_threshold

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"
NANO = load_encoder("nano-flux2", "cpu")


@pytest.fixture(scope="module")
def photos() -> Latents:
    return load_latents(EXAMPLES).to(dtype=torch.float32)


@pytest.fixture(scope="module")
def pipe(photos: Latents) -> Any:
    names = photos.ids or ()
    labels = ["revolver" if "revolver" in name else "other" for name in names]
    made = exact_sdxl_pipeline(photos, labels)
    made.set_progress_bar_config(disable=True)
    return made


def generate(pipe: Any, guard: LatentGuard | None, asked: list[str]) -> Any:
    return pipe(
        **prompt(pipe, asked, leak=0.2),
        height=256,
        width=256,
        num_inference_steps=12,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=guard,
    ).images


def test_the_forbidden_class_never_comes_out_and_the_others_keep_their_bits(pipe: Any) -> None:
    """In a set this small steering comes late; benchmarks/guard.py tells how often it succeeds."""
    asked = ["revolver"] * 4 + ["other"] * 2
    plain = generate(pipe, None, asked)
    before = outcome(pipe, plain).labels
    assert before[:4].count("revolver") >= 3
    guard = LatentGuard(policy(0.5, "steer"), NANO, space="flux2")
    steered = generate(pipe, guard, asked)
    after = outcome(pipe, steered)
    blocked = [verdict.decision == "block" for verdict in guard.verdicts]
    flagged = [
        any(record.verdicts[i] is None or record.verdicts[i].matched for record in guard.history)
        for i in range(len(asked))
    ]
    assert sum(flagged) >= 3
    for i in range(len(asked)):
        if blocked[i]:
            assert not steered[i].any()
        else:
            assert after.labels[i] != "revolver"
            assert after.distance[i] < 0.02
        if not flagged[i]:
            assert torch.equal(steered[i], plain[i])
    assert not all(flagged)
    record = next(r for r in guard.history if "steered" in r.actions)
    one = next(s for s in record.steering if s is not None)
    assert one.concept == "guns"
    assert one.iterations >= 1
    assert one.after < one.before


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_steered_latent_comes_under_the_threshold_and_keeps_its_norm(
    photos: Latents, inference: bool, dtype: torch.dtype
) -> None:
    rows = [i for i, name in enumerate(photos.ids or ()) if "revolver" in name]
    scorer = Scorer(policy(0.5, "steer"), NANO)
    x0 = photos.pick(rows).to(dtype)
    noisy = Latents(x0.tensor + 2 * torch.randn_like(x0.tensor), "flux2", True)
    with torch.inference_mode(inference):
        given = noisy.to(dtype, copy=True)
        moved, records = Steerer(scorer)(given, x0, [{"guns"}] * len(rows), 2.0, 1.0)
    assert torch.equal(given.tensor, noisy.tensor.to(dtype))
    assert moved.dtype == torch.float32
    norms = [x.float().flatten(1).norm(dim=1) for x in (moved, given.tensor)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
    limit = resolve_threshold(
        scorer.plain["concepts"][0], scorer.plain, logit_scale=NANO.logit_scale
    )
    for record in records:
        assert record.reached
        assert record.before > limit
        assert record.after <= limit - SLACK + 1e-6


def test_steering_that_fails_blocks_at_the_end() -> None:
    pipe = small.flux2()
    guard = LatentGuard(policy(ALWAYS, "steer", concept="steer: {iterations: 1}"), NANO)
    pipe.callback_on_step_end = guard
    assert not pipe(**small.flux2_arguments()).images.any()
    assert [record.actions[0] for record in guard.history] == ["steered"] * 3 + ["blocked"]
    assert guard.verdicts[0].reason.endswith("and it is too late to steer")
    assert "concept 'guns' matched 'revolver'" in guard.verdicts[0].reason
