"""Steering on generations whose outcome is known, and the noise search for few-step models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from guard_helpers import ALWAYS, LinearEncoder, policy

from latentguard import LatentGuard, Latents, Scorer, load_encoder
from latentguard.evaluate.exact import exact_sdxl_pipeline, outcome, prompt
from latentguard.files import load_latents
from latentguard.guard import Session
from latentguard.guard.steering import RELEASE, Steerer

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
def test_a_steered_latent_comes_under_its_limit_and_keeps_its_norm(
    photos: Latents, inference: bool, dtype: torch.dtype
) -> None:
    rows = [i for i, name in enumerate(photos.ids or ()) if "revolver" in name]
    scorer = Scorer(policy(0.5, "steer", concept="steer: {iterations: 12}"), NANO)
    x0 = photos.pick(rows).to(dtype)
    noisy = Latents(x0.tensor + 2 * torch.randn_like(x0.tensor), "flux2", True)
    with torch.inference_mode(inference):
        given = noisy.to(dtype, copy=True)
        moved, records = Steerer(scorer)(given, x0, [{"guns"}] * len(rows), 2.0, 1.0)
    assert torch.equal(given.tensor, noisy.tensor.to(dtype))
    assert moved.dtype == torch.float32
    norms = [x.float().flatten(1).norm(dim=1) for x in (moved, given.tensor)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
    limit = -RELEASE / NANO.logit_scale  # the margin of a probability of 0.5 is 0
    for record in records:
        assert record is not None
        assert record.reached
        assert record.before > 0
        assert record.after <= limit


def test_what_is_under_its_limit_keeps_its_numbers(photos: Latents) -> None:
    rows = [i for i, name in enumerate(photos.ids or ()) if "revolver" not in name][:2]
    x0 = photos.pick(rows)
    moved, records = Steerer(Scorer(policy(0.5, "steer"), NANO))(x0, x0, [{"guns"}] * 2, 1.0, 1.0)
    assert records == [None, None]
    assert torch.equal(moved, x0.tensor)


def test_packed_latents_are_steered_as_spatial_ones_are(photos: Latents) -> None:
    rows = [i for i, name in enumerate(photos.ids or ()) if "revolver" in name][:2]
    x0 = photos.pick(rows)
    steerer = Steerer(Scorer(policy(0.5, "steer"), NANO))
    spatial, records = steerer(x0, x0, [{"guns"}] * len(x0), 1.0, 0.5)
    packed, again = steerer(x0.to_packed(), x0.to_packed(), [{"guns"}] * len(x0), 1.0, 0.5)
    assert records == again
    torch.testing.assert_close(packed, x0.space.to_packed(spatial))


def test_a_push_follows_the_schedule_and_grows_with_what_comes_back(photos: Latents) -> None:
    """Many small steps push as far as few large ones: by the share that the noise falls."""
    row = next(i for i, name in enumerate(photos.ids or ()) if "revolver" in name)
    x0 = photos.pick([row])
    scorer = Scorer(policy(0.5, "steer", concept="steer: {iterations: 2}"), NANO)
    # Noise so strong that keeping the norm changes nothing.
    noisy = Latents(1000 * torch.randn_like(x0.tensor), "flux2", True)

    def way(after: float, since: float = 2.0) -> torch.Tensor:
        moved, _ = Steerer(scorer)(noisy, x0, [{"guns"}], 2.0, 1.0, after, [since])
        return moved - noisy.tensor

    # The push is a hundredth of the noise at the most: float32 leaves it about three digits.
    torch.testing.assert_close(way(1.0), 5 * way(1.8), rtol=0.05, atol=0.02)
    torch.testing.assert_close(way(1.0, since=4.0), 2 * way(1.0), rtol=0.05, atol=0.02)


def test_once_steered_an_image_has_to_stay_below_its_threshold() -> None:
    """One that never was flagged passes with the same latents: the threshold itself is lower."""
    encoder = LinearEncoder("sdxl", 4)
    latents = Latents(
        torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)), "sdxl", True
    )
    margins = Scorer(policy(), encoder).score(latents).margin[:, 0]
    order = margins.argsort()
    worst, near = int(order[-1]), int(order[-8])
    limit = float(margins[near]) + 0.2 * RELEASE / encoder.logit_scale
    assert float(margins[worst]) > limit
    rule = policy(torch.sigmoid(torch.tensor(encoder.logit_scale * limit)).item(), "steer")
    fresh = Session(Scorer(rule, encoder))
    last = latents.pick([near])
    assert fresh.step(last, noise_level=0.0, final=True).verdicts[0].decision == "allow"
    steered = Session(Scorer(rule, encoder))
    flagged = latents.pick([worst])
    assert steered.step(flagged, flagged, noise_level=1.0).verdicts[0].decision == "steer"
    verdict = steered.step(last, noise_level=0.0, final=True).verdicts[0]
    assert verdict.decision == "block"
    assert "concept 'guns' was steered away from, and its margin of" in verdict.reason
    assert not steered.step(last, noise_level=0.0, final=True).latents.tensor.any()


def test_steering_that_fails_blocks_at_the_end() -> None:
    pipe = small.flux2()
    guard = LatentGuard(policy(ALWAYS, "steer", concept="steer: {iterations: 1}"), NANO)
    pipe.callback_on_step_end = guard
    assert not pipe(**small.flux2_arguments()).images.any()
    assert [record.actions[0] for record in guard.history] == ["steered"] * 3 + ["blocked"]
    assert guard.verdicts[0].reason.endswith("and it is too late to steer")
    assert "concept 'guns' matched 'revolver'" in guard.verdicts[0].reason


def test_patches_are_steered_as_their_cells_are(photos: Latents) -> None:
    names = list(photos.ids or ())
    cells = photos[names.index("revolver")]
    patches = Latents(cells.space.patchify(cells.tensor), cells.space, True, "patches")
    moved = []
    for latents in (cells, patches):
        session = Session(Scorer(policy(0.5, "steer"), NANO))
        result = session.step(latents, latents, noise_level=0.5)
        assert result.verdicts[0].error is None
        moved.append(result.latents)
    assert not torch.equal(moved[0].tensor, cells.tensor)
    assert moved[1].layout == "patches"
    assert torch.allclose(cells.space.patchify(moved[0].tensor), moved[1].tensor, atol=1e-5)
