"""The exact generator in the real pipelines: every trajectory ends on a photo of its class."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="pipelines need torch")
diffusers = pytest.importorskip("diffusers", reason="the pipelines are those of diffusers")

from latentguard.errors import LatentsError, ModelError  # noqa: E402
from latentguard.evaluate.exact import (  # noqa: E402
    exact_flux2_pipeline,
    exact_sdxl_pipeline,
    outcome,
    prompt,
)
from latentguard.files import load_latents  # noqa: E402
from latentguard.spaces import Latents, LatentSpace  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"
WEAPONS = {"revolver", "revolver-dark", "kitchen-knife-dahlia", "axe-grass"}
SIZE = {"height": 256, "width": 256, "output_type": "latent"}


@pytest.fixture(scope="module")
def photos():
    """The 25 pictures of examples/, as weapons, glasses and the rest."""
    latents = load_latents(EXAMPLES).to(torch.float32)
    names = ["weapon" if i in WEAPONS else "drink" if i.startswith(("beer", "wine")) else "other"
             for i in latents.ids]  # fmt: skip
    return latents, names


@pytest.fixture(scope="module")
def sdxl(photos):
    pipe = exact_sdxl_pipeline(*photos)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def flux2(photos):
    pipe = exact_flux2_pipeline(*photos)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generate(pipe, asked, steps=8, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    arguments = {**prompt(pipe, asked), **SIZE, "num_inference_steps": steps, **kwargs}
    return pipe(**arguments, generator=generator).images


SCHEDULERS = [
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DDIMScheduler", {"clip_sample": False}),
    ("DPMSolverMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("HeunDiscreteScheduler", {}),
]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_sdxl_ends_on_photos_of_the_class(photos, name, settings, guidance):
    scheduler = getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings
    )
    pipe = exact_sdxl_pipeline(*photos, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    asked = ["weapon", "drink", "other", "weapon"]
    found = outcome(pipe, _generate(pipe, asked, guidance_scale=guidance))
    assert list(found.labels) == asked
    assert found.distance.max() < 1e-3


def test_v_prediction_gives_the_same_trajectory(photos, sdxl):
    pipe = exact_sdxl_pipeline(*photos, prediction="v_prediction")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    wanted = _generate(sdxl, ["drink", None])
    torch.testing.assert_close(_generate(pipe, ["drink", None]), wanted, rtol=0, atol=2e-3)


def test_flux2_ends_on_photos_of_the_class(flux2):
    asked = ["weapon", "drink", "other"]
    # The schedule is shifted toward noise: with 8 steps the last one would start at 0.5, where
    # predictions still are means of two photos.
    tokens = _generate(flux2, asked, steps=20)
    assert tokens.shape == (3, 256, 128)
    found = outcome(flux2, tokens)
    assert list(found.labels) == asked
    assert found.distance.max() < 1e-3


def test_unconditional_generations_differ(sdxl):
    found = outcome(sdxl, _generate(sdxl, [None] * 12))
    assert found.distance.max() < 1e-3
    assert len(set(found.index.tolist())) >= 6


def test_early_predictions_are_blurred_and_the_last_is_a_photo(sdxl):
    seen = []

    def record(pipe, step, timestep, values):
        seen.append(outcome(pipe, pipe.scheduler_x0).distance.mean().item())
        return {}

    step = sdxl.scheduler.step

    def keep(*args, **kwargs):
        result = step(*args, **kwargs)
        sdxl.scheduler_x0 = result[1]
        return result

    sdxl.scheduler.step = keep
    try:
        _generate(sdxl, ["weapon", "other"], guidance_scale=1.0, callback_on_step_end=record)
    finally:
        del sdxl.scheduler.step
    assert seen[0] > 0.3
    assert seen[-1] < 1e-3
    # Each photo's share grows from step to step.
    assert all(later < earlier + 0.02 for earlier, later in pairwise(seen))


def test_the_real_pipelines_decode(sdxl, flux2):
    for pipe in (sdxl, flux2):
        image = _generate(pipe, [None], steps=2, output_type="pil")[0]
        assert image.size == (256, 256)


def test_scaled_latents_are_raw_ones(sdxl, flux2):
    found = LatentSpace.from_vae_config(flux2.vae.config)
    assert found.name == "flux2"
    assert sdxl.vae.config.scaling_factor == 1.0
    norm = flux2.vae.bn
    std = torch.sqrt(norm.running_var + flux2.vae.config.batch_norm_eps)
    torch.testing.assert_close(std, torch.ones(128))
    assert not norm.running_mean.any()


def test_negative_prompts_are_guided_away_from(sdxl):
    shares = {}
    for negative in ("other", "drink"):
        asked = prompt(sdxl, [None] * 24, negative=[negative] * 24)
        found = outcome(sdxl, _generate(sdxl, [None] * 24, **asked, guidance_scale=8.0))
        assert found.distance.max() < 1e-3
        shares[negative] = found.labels.count("other") / 24
    # Measured: 0.13 and 1.0; 64 % of the pictures are "other".
    assert shares["other"] < 0.5 < shares["drink"]


def test_saved_pipelines_generate_the_same(sdxl, flux2, tmp_path):
    for pipe in (sdxl, flux2):
        folder = tmp_path / type(pipe).__name__
        pipe.save_pretrained(folder)
        # FLUX.2's pipeline does not know its text encoder as optional.
        again = type(pipe).from_pretrained(folder, text_encoder=None, tokenizer=None)
        again.set_progress_bar_config(disable=True)
        wanted = _generate(pipe, ["weapon"])
        assert torch.equal(_generate(again, ["weapon"]), wanted)
        assert outcome(again, wanted).labels == ("weapon",)


def test_klein_pipeline_with_real_guidance(flux2):
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=flux2.scheduler,
        vae=flux2.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=flux2.transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    anything = torch.zeros(2, 1, 3)
    found = _generate(pipe, ["weapon", "drink"], steps=20, negative_prompt_embeds=anything)
    assert outcome(pipe, found).labels == ("weapon", "drink")
    assert outcome(pipe, found).distance.max() < 1e-3


def test_half_precision_pipeline(photos):
    pipe = exact_sdxl_pipeline(*photos).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    latents = _generate(pipe, ["weapon"], guidance_scale=1.0)
    assert latents.dtype == torch.bfloat16
    found = outcome(pipe, latents)
    assert found.labels == ("weapon",)
    assert found.distance.max() < 0.02


def test_one_step_is_differentiable_in_the_noise(photos):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
    )
    pipe = exact_sdxl_pipeline(*photos, scheduler=scheduler)
    pipe.scheduler.set_timesteps(1)
    noise = torch.randn(1, 32, 32, 32, requires_grad=True)
    asked = prompt(pipe, [None])["prompt_embeds"]
    predicted = pipe.unet(noise, pipe.scheduler.timesteps[0], asked).sample
    predicted.square().sum().backward()
    assert noise.grad.abs().sum() > 0


def test_sizes_and_spaces_that_do_not_fit(photos, sdxl, flux2):
    with pytest.raises(LatentsError, match=r"knows latents of \[32, 32, 32\]"):
        sdxl(**prompt(sdxl, [None]), height=512, width=512, num_inference_steps=1)
    with pytest.raises(LatentsError, match="knows 256 tokens"):
        flux2(**prompt(flux2, [None]), height=128, width=128, num_inference_steps=1)
    with pytest.raises(LatentsError, match="must hold flux2 latents, got sdxl"):
        exact_flux2_pipeline(Latents(torch.randn(2, 4, 8, 8), "sdxl", True), ["a", "b"])
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler has not"):
        exact_sdxl_pipeline(*photos, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ModelError, match="has no exact denoiser"):
        prompt(object(), ["a"])
