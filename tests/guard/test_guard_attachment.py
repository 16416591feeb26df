"""Every way of attaching a guard, on every kind of pipeline: seen, and nothing else changed."""

from __future__ import annotations

import copy
import json
import threading
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PixArtSigmaPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import (
    MultiPipelineCallbacks,
    PipelineCallback,
    SDXLCFGCutoffCallback,
)
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy

from latentguard import LatentGuard, Latents, LatentSpace, Scorer, load_encoder
from latentguard.errors import LatentGuardError, LatentsError, PolicyError
from latentguard.guard import GenerationBlocked

PIPELINES: dict[str, tuple[Any, Any, Any]] = {
    "sdxl": (small.sdxl, small.sdxl_arguments, load_encoder("nano-sdxl", "cpu")),
    "flux2": (small.flux2, small.flux2_arguments, load_encoder("nano-flux2", "cpu")),
    "sd1": (small.sd1, small.sd1_arguments, LinearEncoder("sd1", 4)),
    "lcm": (small.lcm, small.lcm_arguments, LinearEncoder("sd1", 4)),
    "sd3": (small.sd3, small.sd3_arguments, LinearEncoder("sd3", 16)),
    "flux": (small.flux, small.flux_arguments, LinearEncoder("flux1", 16)),
}


def guard_for(kind: str, threshold: float = NEVER, **options: Any) -> LatentGuard:
    return LatentGuard(policy(threshold, **options), PIPELINES[kind][2])


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_a_guard_that_allows_changes_nothing(kind: str, output_type: str) -> None:
    make, arguments, _ = PIPELINES[kind]
    plain = make()(**arguments(2, output_type=output_type)).images
    pipe = make()
    guard = guard_for(kind, action="observe")
    pipe.callback_on_step_end = guard
    guarded = pipe(**arguments(2, output_type=output_type)).images
    assert np.array_equal(_array(plain), _array(guarded))
    assert [verdict.decision for verdict in guard.verdicts] == ["allow", "allow"]
    history = guard.history
    assert [record.final for record in history] == [False] * 3 + [True]
    assert history[-1].noise_level == 0
    levels = [record.noise_level for record in history]
    assert levels == sorted(levels, reverse=True)


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("output_type", ["np", "pt", "pil", "latent"])
def test_a_guard_that_blocks_leaves_blanks(kind: str, output_type: str) -> None:
    make, arguments, _ = PIPELINES[kind]
    pipe = make()
    guard = guard_for(kind, ALWAYS)
    pipe.callback_on_step_end = guard
    output = pipe(**arguments(2, output_type=output_type))
    plain = make()(**arguments(2, output_type=output_type))
    assert type(output) is type(plain)
    assert _array(output.images).shape == _array(plain.images).shape
    assert not _array(output.images).any()
    assert [verdict.decision for verdict in guard.verdicts] == ["block", "block"]
    assert len(guard.history) == 1  # stopped at the first step


@pytest.mark.parametrize("kind", PIPELINES)
def test_return_dict_false(kind: str) -> None:
    make, arguments, _ = PIPELINES[kind]
    pipe = make()
    pipe.callback_on_step_end = guard_for(kind, ALWAYS)
    output = pipe(**arguments(1, return_dict=False))
    assert isinstance(output, tuple)
    assert not _array(output[0]).any()


def test_as_an_argument() -> None:
    pipe, guard = small.sdxl(), guard_for("sdxl", ALWAYS)
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=guard).images.any()
    assert pipe(**small.sdxl_arguments()).images.any()  # for that call only


def test_none_detaches() -> None:
    pipe = small.sdxl()
    pipe.callback_on_step_end = guard_for("sdxl", ALWAYS)
    assert isinstance(pipe.callback_on_step_end, LatentGuard)
    pipe.callback_on_step_end = None
    assert pipe.callback_on_step_end is None
    assert pipe(**small.sdxl_arguments()).images.any()


def test_a_guard_that_is_kept_and_not_attached_is_told_of_by_each_call() -> None:
    pipe = small.sdxl()
    pipe.guard = guard = guard_for("sdxl", ALWAYS)
    with pytest.warns(UserWarning, match="keeps a LatentGuard as guard, and this call") as told:
        pipe(**small.sdxl_arguments(1))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe(**small.sdxl_arguments(1), callback_on_step_end=pipe.guard)
        pipe.callback_on_step_end = pipe.guard
        pipe(**small.sdxl_arguments(1))
    assert guard.verdicts[0].decision == "block"


def test_among_multi_pipeline_callbacks_the_guard_is_last() -> None:
    pipe, guard = small.sdxl(), guard_for("sdxl", ALWAYS)

    class Restore(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline: Any, index: int, t: Any, kwargs: Any) -> Any:
            return {**kwargs, "latents": torch.ones_like(kwargs["latents"])}

    both = MultiPipelineCallbacks([guard, Restore()])
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=both).images.any()
    pipe.callback_on_step_end = both
    assert not pipe(**small.sdxl_arguments()).images.any()


def test_beside_a_callback_of_diffusers() -> None:
    pipe = small.sdxl()
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    plain = pipe(**small.sdxl_arguments(), callback_on_step_end=cutoff).images
    guard = guard_for("sdxl", action="observe")
    pipe.callback_on_step_end = guard
    guarded = pipe(**small.sdxl_arguments(), callback_on_step_end=cutoff).images
    assert np.array_equal(plain, guarded)
    assert len(guard.history) == 4


@pytest.mark.parametrize("inputs", [None, ["latents"], ["prompt_embeds"]])
def test_a_callback_of_ones_own_gets_what_it_asked_for(inputs: list[str] | None) -> None:
    pipe, seen = small.sdxl(), []

    def mine(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, sorted(kwargs)))
        return kwargs

    more = {} if inputs is None else {"callback_on_step_end_tensor_inputs": inputs}
    pipe.callback_on_step_end = guard_for("sdxl", action="observe")
    pipe(**small.sdxl_arguments(), callback_on_step_end=mine, **more)
    assert seen == [(i, inputs or ["latents"]) for i in range(4)]


def test_the_class_in_the_place_of_a_guard_is_told_so() -> None:
    pipe = small.sdxl()
    with pytest.raises(TypeError, match=r"got the class LatentGuard: make one of it, LatentGuard"):
        pipe.callback_on_step_end = LatentGuard


def test_a_callback_that_returns_no_dict_is_told_so() -> None:
    pipe = small.sdxl()
    pipe.callback_on_step_end = guard_for("sdxl")
    with pytest.raises(TypeError, match="must return a dict"):
        pipe(**small.sdxl_arguments(), callback_on_step_end=lambda *args: None)


@pytest.mark.parametrize(
    "scheduler",
    [
        HeunDiscreteScheduler(**small.BETAS),
        DPMSolverMultistepScheduler(**small.BETAS),
        UniPCMultistepScheduler(**small.BETAS),
        EulerAncestralDiscreteScheduler(**small.BETAS),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers(scheduler: Any) -> None:
    plain = small.sdxl(scheduler=scheduler)(**small.sdxl_arguments()).images
    pipe, guard = small.sdxl(scheduler=scheduler), guard_for("sdxl", action="observe")
    pipe.callback_on_step_end = guard
    assert np.array_equal(plain, pipe(**small.sdxl_arguments()).images)
    assert guard.history[-1].final
    assert guard.history[-1].noise_level == 0


def test_img2img_and_inpainting() -> None:
    image = torch.rand(1, 3, small.SIZE, small.SIZE)
    mask = torch.ones(1, 1, small.SIZE, small.SIZE)
    for make, more in (
        (small.img2img, {"image": image, "strength": 0.5}),
        (small.inpaint, {"image": image, "mask_image": mask, "strength": 0.9}),
    ):
        more = {**more, "height": small.SIZE, "width": small.SIZE}
        if make is small.img2img:
            more = {"image": image, "strength": 0.5}
        plain = make()(**small.sdxl_arguments(), **more).images
        pipe, guard = make(), guard_for("sdxl", action="observe")
        pipe.callback_on_step_end = guard
        assert np.array_equal(plain, pipe(**small.sdxl_arguments(), **more).images)
        assert guard.history[-1].final
        pipe.callback_on_step_end = guard_for("sdxl", ALWAYS)
        assert not pipe(**small.sdxl_arguments(), **more).images.any()


def test_one_step_models() -> None:
    scheduler = EulerAncestralDiscreteScheduler(**small.BETAS, timestep_spacing="trailing")
    pipe, guard = small.sdxl(scheduler=scheduler), guard_for("sdxl", ALWAYS)
    pipe.callback_on_step_end = guard
    output = pipe(**small.sdxl_arguments(steps=1, guidance_scale=0.0))
    assert not output.images.any()
    assert [record.final for record in guard.history] == [True]


def test_a_vae_with_a_scaling_of_its_own_is_read_by_that_scaling() -> None:
    """Playground 2.5 is an SDXL pipeline whose VAE normalizes each channel."""
    pipe, playground = small.sdxl(), LatentSpace.get("sdxl-playground25")
    pipe.vae.register_to_config(
        scaling_factor=0.5,
        latents_mean=list(playground.mean or ()),
        latents_std=list(playground.std or ()),
    )
    guard = LatentGuard(policy(NEVER), LinearEncoder("sdxl", 4))
    assert guard._space_of(pipe) == playground
    pipe.callback_on_step_end = guard
    latents = pipe(**small.sdxl_arguments(2, output_type="latent")).images
    scorer = Scorer(policy(NEVER), LinearEncoder("sdxl", 4))
    raw = Latents(playground.to_raw(latents), "sdxl", scaled=False)
    for found, expected in zip(guard.verdicts, scorer.verdicts(raw), strict=True):
        assert found.concepts[0].margin == pytest.approx(expected.concepts[0].margin, abs=1e-5)
    for given in ("sdxl", replace(playground, scale=0.5)):
        with pytest.raises(LatentsError, match=r"VAE of this .* has scale .*: leave space out"):
            pipe.callback_on_step_end = LatentGuard(policy(NEVER), space=given)
    pipe.callback_on_step_end = LatentGuard(policy(NEVER), space="sdxl-playground25")


@pytest.mark.parametrize("scale", [0.0, 5.0])
def test_guidance_off_and_on(scale: float) -> None:
    pipe, guard = small.sdxl(), guard_for("sdxl", action="observe")
    pipe.callback_on_step_end = guard
    pipe(**small.sdxl_arguments(2, guidance_scale=scale))
    assert all(len(record.verdicts) == 2 for record in guard.history)


def test_num_images_per_prompt() -> None:
    pipe, guard = small.sdxl(), guard_for("sdxl", action="observe")
    pipe.callback_on_step_end = guard
    pipe(**small.sdxl_arguments(2), num_images_per_prompt=2)
    assert len(guard.verdicts) == 4


def test_denoising_end_is_the_end() -> None:
    """The base of a base-and-refiner pair gives noisy latents: their x0 is judged as final."""
    pipe, guard = small.sdxl(), guard_for("sdxl", ALWAYS, concept="noise_window: [0, 0]")
    pipe.callback_on_step_end = guard
    output = pipe(**{**small.sdxl_arguments(), "output_type": "latent"}, denoising_end=0.6)
    assert not output.images.any()
    assert guard.history[-1].final
    assert guard.history[-1].noise_level > 0.1


def test_other_images_of_the_batch_are_untouched_to_the_last_bit() -> None:
    pipe = small.sdxl()
    plain = pipe(**small.sdxl_arguments(4)).images
    probe = guard_for("sdxl", action="observe")
    pipe(**small.sdxl_arguments(4), callback_on_step_end=probe)
    scores = [verdict.concepts[0].probability for verdict in probe.history[1].verdicts if verdict]
    threshold = sorted(scores)[2]  # two of the four reach it at that step
    level = probe.history[1].noise_level
    guard = guard_for("sdxl", threshold, concept=f"noise_window: [{level * 0.99}, {level * 1.01}]")
    guarded = pipe(**small.sdxl_arguments(4), callback_on_step_end=guard).images
    blocked = [i for i, verdict in enumerate(guard.verdicts) if verdict.decision == "block"]
    assert set(blocked) >= {i for i, score in enumerate(scores) if score >= threshold}
    assert 0 < len(blocked) < 4
    for i in range(4):
        assert not guarded[i].any() if i in blocked else np.array_equal(guarded[i], plain[i])


def test_on_block_raise_carries_what_was_allowed() -> None:
    pipe = small.sdxl()
    pipe.callback_on_step_end = guard_for("sdxl", ALWAYS, extra="on_block: raise")
    with pytest.raises(GenerationBlocked, match=r"1 of 1 images were blocked; block: concept"):
        pipe(**small.sdxl_arguments())


def test_on_block_callback_gives_the_replacement() -> None:
    asked = []

    def replacement(index: int, verdict: Any, blank: Any) -> Any:
        asked.append((index, verdict.decision))
        return blank + 0.25

    guard = LatentGuard(policy(ALWAYS, extra="on_block: callback"), on_block=replacement)
    pipe = small.sdxl()
    pipe.callback_on_step_end = guard
    assert (pipe(**small.sdxl_arguments(2)).images == 0.25).all()
    assert asked == [(0, "block"), (1, "block")]


@pytest.mark.parametrize("function", [None, lambda *args: None])
def test_on_block_and_its_function_go_together(function: Any) -> None:
    extra = "on_block: callback" if function is None else "on_block: blank"
    with pytest.raises(PolicyError, match="go together"):
        LatentGuard(policy(extra=extra), on_block=function)


def test_a_pipeline_without_a_step_callback_is_refused_at_attachment() -> None:
    from diffusers import PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=small.autoencoder(4, 0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    with pytest.raises(LatentsError, match="PixArtSigmaPipeline has no callback_on_step_end"):
        pipe.callback_on_step_end = guard_for("sdxl")
    with pytest.raises(LatentGuardError, match="PixArtSigmaPipeline"):
        pipe(prompt_embeds=torch.zeros(1, 2, 8), callback_on_step_end=guard_for("sdxl"))
    with pytest.raises(LatentGuardError, match="callback_on_step_end"):
        pipe(prompt_embeds=torch.zeros(1, 2, 8), callback=guard_for("sdxl"))


def test_an_unknown_space_is_refused_at_attachment() -> None:
    pipe = small.sdxl()
    pipe.vae = small.autoencoder(4, 0.5)
    with pytest.raises(LatentsError, match=r"StableDiffusionXLPipeline.*no known latent space"):
        pipe.callback_on_step_end = guard_for("sdxl")
    pipe.callback_on_step_end = LatentGuard(policy(NEVER), space="sdxl")


def test_a_space_that_is_not_the_vaes_is_refused_at_attachment() -> None:
    pipe = small.sdxl()
    for wrong in ("sd1", "flux2"):
        message = f"space is given as {wrong}, but the VAE of this StableDiffusionXL.*of sdxl lat"
        with pytest.raises(LatentsError, match=message):
            pipe.callback_on_step_end = LatentGuard(policy(NEVER), space=wrong)
    pipe.callback_on_step_end = LatentGuard(policy(NEVER), space="sdxl")


def test_an_unknown_scheduler_is_refused() -> None:
    from diffusers import IPNDMScheduler

    pipe = small.sdxl()
    pipe.callback_on_step_end = guard_for("sdxl")
    pipe.scheduler = IPNDMScheduler()
    with pytest.raises(LatentsError, match="IPNDMScheduler"):
        pipe(**small.sdxl_arguments())


def test_a_tiny_autoencoder_leaves_the_space_to_the_pipeline() -> None:
    pipe = small.sdxl()
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=4,
    )
    guard = guard_for("sdxl", ALWAYS, concept="noise_window: [0, 0]")
    pipe.callback_on_step_end = guard
    assert not pipe(**small.sdxl_arguments()).images.any()
    assert guard.last is not None
    assert guard.last.identity["space"] == "sdxl"


def test_dtypes() -> None:
    pipe, guard = small.sdxl().to(dtype=torch.bfloat16), guard_for("sdxl", action="observe")
    pipe.callback_on_step_end = guard
    embeds = {
        key: value.bfloat16() if isinstance(value, torch.Tensor) else value
        for key, value in small.sdxl_arguments().items()
    }
    latents = pipe(**{**embeds, "output_type": "latent"}).images
    assert latents.dtype == torch.bfloat16
    assert guard.verdicts[0].decision == "allow"


def test_to_and_save_pretrained_keep_working(tmp_path: Any) -> None:
    pipe = small.flux2()
    pipe.callback_on_step_end = guard_for("flux2", ALWAYS)
    assert not pipe.to("cpu")(**small.flux2_arguments()).images.any()
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    assert "latentguard" not in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    assert not any("guard" in key for key in pipe.config)


def test_copies_are_guarded_and_share_the_guard() -> None:
    pipe = small.sdxl()
    pipe.callback_on_step_end = guard_for("sdxl", ALWAYS)
    for other in (copy.copy(pipe), copy.deepcopy(pipe)):
        assert other.callback_on_step_end is pipe.callback_on_step_end
        assert not other(**small.sdxl_arguments()).images.any()


def test_from_pipe_carries_the_guard_over() -> None:
    pipe = small.sdxl()
    pipe.callback_on_step_end = guard_for("sdxl", ALWAYS)
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    assert other.callback_on_step_end is pipe.callback_on_step_end


def test_pipelines_that_share_components_are_not_guarded_by_it() -> None:
    pipe = small.sdxl()
    other = StableDiffusionXLPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    pipe.callback_on_step_end = guard_for("sdxl", ALWAYS)
    assert other(**small.sdxl_arguments()).images.any()
    assert not pipe(**small.sdxl_arguments()).images.any()


def test_subclasses_made_later_are_guarded() -> None:
    class Mine(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    pipe = Mine(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.callback_on_step_end = guard_for("sdxl", ALWAYS)
    assert not pipe(**small.sdxl_arguments()).images.any()


def test_a_subclass_with_a_loop_of_its_own_is_withheld() -> None:
    class Mine(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return ["an image that nobody saw"]

    pipe = Mine(**small.sdxl().components, add_watermarker=False)
    pipe.callback_on_step_end = guard_for("sdxl", ALWAYS)
    with pytest.raises(LatentsError, match="its output is withheld"):
        pipe(**small.sdxl_arguments())


def test_two_guards_in_two_threads() -> None:
    pipes = [small.sdxl(), small.sdxl()]
    guards = [guard_for("sdxl", ALWAYS), guard_for("sdxl", action="observe")]
    images: list[Any] = [None, None]

    def generate(i: int) -> None:
        pipes[i].callback_on_step_end = guards[i]
        images[i] = pipes[i](**small.sdxl_arguments()).images
        assert guards[i].verdicts[0].decision == ("block" if i == 0 else "allow")

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not images[0].any()
    assert images[1].any()


def test_two_guards_on_one_call_both_judge() -> None:
    pipe = small.sdxl()
    first, second = guard_for("sdxl", action="observe"), guard_for("sdxl", ALWAYS)
    pipe.callback_on_step_end = first
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=second).images.any()
    (record,) = first.history
    assert record.verdicts[0] is not None
    assert record.verdicts[0].decision == "allow"
    assert first.verdicts[0].error == "the final latents were never scored"  # the other ended it
    assert second.verdicts[0].decision == "block"


def test_signatures_stay_what_diffusers_inspects() -> None:
    import inspect

    pipe = small.sdxl()
    pipe.callback_on_step_end = guard_for("sdxl")
    pipe(**small.sdxl_arguments())
    assert "callback_on_step_end" in inspect.signature(pipe.__call__).parameters
    assert (
        "generator"
        in inspect.signature(
            small.sdxl(scheduler=EulerAncestralDiscreteScheduler()).scheduler.step
        ).parameters
    )
    assert isinstance(pipe, DiffusionPipeline)


def _array(images: Any) -> Any:
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images])
    return np.asarray(images)


def test_what_a_guard_says_of_itself() -> None:
    guard = LatentGuard("family", space="sdxl")
    chosen = guard.policy
    identity = {"name": "family", "version": chosen.version, "sha256": chosen.sha256}
    said = {"policy": identity, "model": "auto", "space": "sdxl"}
    assert guard.config == json.loads(guard.to_json_string()) == said
    assert repr(guard).startswith(f"LatentGuard(policy='family' {chosen.version} (")
    assert "cutoff" not in repr(guard) + guard.to_json_string()
    assert LatentGuard(policy(NEVER), LinearEncoder("sdxl", 4)).config["model"] == "linear"
