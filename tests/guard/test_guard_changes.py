"""A guard, its policy or its pipeline changed while a call runs: nothing unscored comes out.

docs/threat-model.md lists these with the ways of test_guard_bypass.py.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy
from guard_traps import FINAL_ONLY, XL, blocking, blocking_late, guarded, latents_of

from latentguard import LatentGuard, Latents, load_policy
from latentguard.errors import LatentsError
from latentguard.guard import Budget, GenerationBlocked

Given = dict[str, Any]
POLICY = """
schema_version: 1
name: edited
version: "1"
concepts:
  - {id: guns, category: weapons, prompts: [revolver], threshold: {probability: 0}, action: block}
"""


# -- the guard ---------------------------------------------------------------------------------


def test_detached_by_a_callback() -> None:
    """From the next call on; this one ends as it began."""

    def detach(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        pipe.callback_on_step_end = None
        return given

    pipe = guarded()
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=detach).images.any()
    assert pipe.callback_on_step_end is None


@pytest.mark.parametrize("again", [True, False])
def test_another_guard_attached_by_a_callback(again: bool) -> None:
    lenient = LatentGuard(policy(NEVER), XL)

    def swap(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        pipe.callback_on_step_end = None
        if again:
            pipe.callback_on_step_end = lenient
        return given

    guard = blocking_late()
    pipe = guarded(guard)
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=swap).images.any()
    assert guard.verdicts[0].decision == "block"
    assert lenient.verdicts == []


def test_del_does_not_detach() -> None:
    pipe = guarded()
    with pytest.raises(AttributeError):
        del pipe.callback_on_step_end
    assert not pipe(**small.sdxl_arguments()).images.any()


def test_an_attachment_that_would_not_be_kept_is_refused() -> None:
    class Shadowed(StableDiffusionXLPipeline):
        callback_on_step_end = property(lambda self: None, lambda self, value: None)

    class Plain(StableDiffusionXLPipeline):
        callback_on_step_end = None

    pipe = Shadowed(**small.sdxl().components, add_watermarker=False)
    with pytest.raises(LatentsError, match="does not keep what it is given"):
        pipe.callback_on_step_end = blocking()
    pipe = Plain(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.callback_on_step_end = blocking()
    assert not pipe(**small.sdxl_arguments()).images.any()


@pytest.mark.parametrize("way", ["__dict__", "object", "class"])
def test_attached_behind_the_descriptors_back(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, guard = small.sdxl(), blocking()
    if way == "__dict__":
        vars(pipe)["callback_on_step_end"] = guard
    elif way == "object":
        object.__setattr__(pipe, "callback_on_step_end", guard)
    else:
        monkeypatch.setattr(StableDiffusionXLPipeline, "callback_on_step_end", guard)
    assert not pipe(**small.sdxl_arguments()).images.any()


def test_a_multi_callback_that_loses_its_guard_in_the_loop() -> None:
    multi = MultiPipelineCallbacks([blocking_late()])

    def empty(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        multi.callbacks.clear()
        return given

    pipe = guarded(multi)
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=empty).images.any()


def test_one_guard_given_twice_judges_once() -> None:
    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard)
    pipe(**small.sdxl_arguments(), callback_on_step_end=MultiPipelineCallbacks([guard, guard]))
    assert len(guard.history) == 4


def test_one_guard_on_two_pipelines_of_which_one_runs_within_the_other() -> None:
    guard = blocking_late()
    inner, outer = guarded(guard), guarded(guard)
    made: list[Any] = []

    def nested(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        if index == 1:
            made.append(inner(**small.sdxl_arguments(2)).images)
        return given

    assert not outer(**small.sdxl_arguments(), callback_on_step_end=nested).images.any()
    assert made[0].shape[0] == 2
    assert not made[0].any()
    assert len(guard.verdicts) == 1  # of the call that ended last


def test_a_copied_guard_judges_too() -> None:
    guard = copy.copy(blocking_late())
    assert not guarded(guard)(**small.sdxl_arguments()).images.any()
    assert guard.verdicts[0].decision == "block"


# -- its policy --------------------------------------------------------------------------------


def test_the_policy_of_a_guard_cannot_be_exchanged() -> None:
    """Scorers are kept: another policy would be shown, and the old one judge."""
    guard = blocking_late()
    with pytest.raises(AttributeError):
        guard.policy = policy(NEVER)  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        guard.policy.on_error = "allow"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        guard.policy.concepts[0].action = "observe"  # type: ignore[misc]
    with pytest.raises(TypeError):
        guard.policy.concepts[0] = None  # type: ignore[index]


def test_a_policy_file_that_is_edited(tmp_path: Path) -> None:
    """A guard keeps what it loaded, and its digest says what that was."""
    path = tmp_path / "edited.yaml"
    path.write_text(POLICY)
    guard = LatentGuard(path, XL)
    digest = guard.policy.sha256

    def edit(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        path.write_text(POLICY.replace("block", "observe"))
        return given

    pipe = small.sdxl()
    assert not pipe(
        **small.sdxl_arguments(), callback_on_step_end=MultiPipelineCallbacks([guard, edit])
    ).images.any()
    assert guard.last is not None
    assert guard.last.identity["policy_sha256"] == digest
    assert load_policy(path).sha256 != digest
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=guard).images.any()


# -- the pipeline ------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["np", "latent"])
@pytest.mark.parametrize("count", [1, 10_000])
def test_a_number_of_steps_that_is_not_true(count: int, output_type: str) -> None:
    def lie(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        pipe._num_timesteps = count
        return given

    pipe = guarded()
    arguments = small.sdxl_arguments(output_type=output_type, callback_on_step_end=lie)
    assert not pipe(**arguments).images.any()


def test_a_scheduler_that_is_set_anew_in_the_loop() -> None:
    def reset(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        if index == 1:
            pipe.scheduler.set_timesteps(2)
        return given

    pipe = guarded()
    try:
        output = pipe(**small.sdxl_arguments(), callback_on_step_end=reset)
    except IndexError:  # of the scheduler: nothing came out at all
        return
    assert not output.images.any()


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_a_scheduler_that_lies_about_x0(output_type: str) -> None:
    class Lying(EulerDiscreteScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            before, _ = super().step(model_output, timestep, sample, **kwargs)
            return (before, torch.zeros_like(before))

    pipe = guarded(make=lambda: small.sdxl(scheduler=Lying(**small.BETAS)))
    assert not pipe(**small.sdxl_arguments(output_type=output_type)).images.any()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_that_is_changed_in_the_loop(rows: int, at: int) -> None:
    """Whichever image is whose is not known any more."""

    def resize(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        if index != at:
            return given
        return {
            name: value[:1].repeat(rows, *[1] * (value.ndim - 1)) for name, value in given.items()
        }

    pipe = guarded(LatentGuard(policy(NEVER), XL))
    names = ["latents"]
    with pytest.raises((GenerationBlocked, RuntimeError)):
        pipe(
            **small.sdxl_arguments(2, guidance_scale=0.0),
            callback_on_step_end=resize,
            callback_on_step_end_tensor_inputs=names,
        )


def test_another_image_in_the_place_of_the_batch() -> None:
    """The rows are exchanged at each step: a block stays with its row, and all ends are judged."""

    def turn(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        return {"latents": given["latents"].flip(0)}

    found = latents_of(guarded(), batch=2, callback_on_step_end=turn)
    assert not found.any()


def test_a_pipeline_that_becomes_one_of_another_class() -> None:
    class Quiet(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return [torch.ones(1)]

    pipe = guarded()
    pipe.__class__ = Quiet
    with pytest.raises(LatentsError, match="its output is withheld"):
        pipe(**small.sdxl_arguments())


def test_a_call_that_comes_from_a_base_which_is_no_pipeline() -> None:
    class Dropping:
        def __call__(self, *args: Any, callback_on_step_end: Any = None, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    class Mixed(Dropping, StableDiffusionXLPipeline):
        pass

    pipe = Mixed(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(LatentsError, match="its output is withheld"):
        pipe(**small.sdxl_arguments(), callback_on_step_end=blocking())
    pipe.callback_on_step_end = blocking()
    assert not pipe(**small.sdxl_arguments()).images.any()
    Dropping.__call__ = lambda self, *args, **kwargs: "no pipeline"  # type: ignore[method-assign]
    assert Dropping()() == "no pipeline"


def test_a_pipeline_that_no_longer_offers_its_latents() -> None:
    pipe = guarded()
    pipe._callback_tensor_inputs = []
    with pytest.raises(LatentsError, match="no latents in its step callback"):
        pipe(**small.sdxl_arguments())


def test_without_a_vae() -> None:
    """As services that decode elsewhere have it; the space has to be said."""
    pipe = small.sdxl()
    pipe.vae = None
    with pytest.raises(LatentsError, match="has no VAE that tells its latent space"):
        pipe.callback_on_step_end = blocking_late()
    pipe.callback_on_step_end = blocking_late(space="sdxl")
    assert not latents_of(pipe, height=small.SIZE, width=small.SIZE).any()


@pytest.mark.parametrize("output_type", ["none such", None])
def test_an_output_type_that_is_not_known(output_type: Any) -> None:
    pipe = guarded(blocking())
    try:
        images = pipe(**small.sdxl_arguments(output_type=output_type)).images
    except ValueError:  # of diffusers: nothing came out at all
        return
    assert not np.stack([np.asarray(image) for image in images]).any()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("output_type", ["np", "pil", "pt", "latent"])
def test_a_plain_tuple(output_type: str, late: bool) -> None:
    pipe = guarded(blocking_late() if late else blocking())
    images, *rest = pipe(**small.sdxl_arguments(2, output_type=output_type, return_dict=False))
    assert rest == []
    assert len(images) == 2
    assert not np.stack([np.asarray(image) for image in images]).any()


@pytest.mark.parametrize(
    "more",
    [
        {"timesteps": [999, 700]},
        {"sigmas": [14.0, 9.0]},
        {"generator": [torch.Generator().manual_seed(i) for i in range(2)]},
        {"generator": None},
        {"latents": torch.zeros(2, 4, 8, 8)},
        {"num_inference_steps": 1},
        {"denoising_end": 0.01},
        {"guidance_scale": 0.0},
        {"guidance_rescale": 0.7},
        {"eta": 1.0},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_arguments_that_cut_or_steer_the_loop(more: dict[str, Any], output_type: str) -> None:
    pipe = guarded()
    arguments = {**small.sdxl_arguments(2, output_type=output_type), **more}
    assert not pipe(**arguments).images.any()


@pytest.mark.parametrize("strength", [0.01, 0.25, 0.26, 1.0])
def test_the_strength_of_image_to_image(strength: float) -> None:
    pipe = guarded(make=small.img2img)
    image = torch.rand(1, 3, small.SIZE, small.SIZE)
    try:
        output = pipe(**small.sdxl_arguments(), image=image, strength=strength)
    except ValueError:  # of diffusers, for less than one step: nothing came out at all
        assert strength < 0.25
        return
    assert not output.images.any()


# -- callbacks and errors ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pop", "nothing", "other keys", "none"])
def test_a_callback_that_returns_no_latents(how: str) -> None:
    def withhold(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        if how == "pop":
            given.pop("latents")
            return given
        if how == "none":
            return {"latents": None}
        return {} if how == "nothing" else {"mine": torch.ones(1)}

    pipe = guarded()
    try:
        output = pipe(**small.sdxl_arguments(), callback_on_step_end=withhold)
    except (AttributeError, TypeError):
        assert how == "none"
        return
    assert not output.images.any()


def test_a_call_that_asks_for_no_tensors() -> None:
    seen: list[Given] = []

    def mine(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        seen.append(dict(given))
        return given

    pipe, more = guarded(), {"callback_on_step_end_tensor_inputs": []}
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=mine, **more).images.any()
    assert seen == [{}] * 4
    assert not pipe(**small.sdxl_arguments(), **more).images.any()


def test_an_interrupt_from_the_keyboard_in_the_guard() -> None:
    class Interrupted(LinearEncoder):
        def features(self, latents: torch.Tensor, *args: Any) -> Any:
            raise KeyboardInterrupt

    pipe = guarded(LatentGuard(policy(NEVER), Interrupted("sdxl", 4)))
    with pytest.raises(KeyboardInterrupt):
        pipe(**small.sdxl_arguments())


def test_a_call_after_one_that_failed() -> None:
    """Nothing of a failed call is left that the next one could be taken for."""

    def fails(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        raise RuntimeError("mine")

    guard = blocking_late()
    pipe = guarded(guard)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            pipe(**small.sdxl_arguments(), callback_on_step_end=fails)
        assert not pipe(**small.sdxl_arguments()).images.any()
        assert [record.final for record in guard.history] == [False] * 3 + [True]


def test_an_exception_that_carries_the_latents() -> None:
    class Smuggled(Exception):  # noqa: N818
        pass

    def smuggle(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        if index == 3:
            raise Smuggled(given["latents"])
        return given

    with pytest.raises(Smuggled) as caught:
        guarded()(**small.sdxl_arguments(), callback_on_step_end=smuggle)
    assert not caught.value.args[0].any()


def test_a_limit_of_steps_that_the_loop_exceeds() -> None:
    guard = LatentGuard(policy(NEVER), XL, budget=Budget(steps=2))
    assert not guarded(guard)(**small.sdxl_arguments()).images.any()
    assert "more than 2 steps" in guard.verdicts[0].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_overflows(dtype: torch.dtype) -> None:
    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard).to(dtype=dtype)
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in small.sdxl_arguments().items()
    }
    latents = torch.full((1, 4, 8, 8), 6e4, dtype=dtype)
    if dtype == torch.bfloat16:
        latents = latents * 1e30
    output = pipe(**arguments, latents=latents)
    assert not output.images.any()
    assert guard.verdicts[0].error is not None


def test_autocast_does_not_change_what_is_judged() -> None:
    pipe = small.sdxl()
    made = latents_of(pipe)
    scores = []
    for enabled in (False, True):
        guard = LatentGuard(policy(action="observe"), XL)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            session = guard.session()
            session.step(Latents(made, "sdxl", scaled=True), noise_level=0.0, final=True)
        scores.append(session.verdicts[0].concepts[0].margin)
    assert scores[0] == scores[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert not guarded()(**small.sdxl_arguments()).images.any()


# -- threads -----------------------------------------------------------------------------------


def test_threads_that_share_one_pipeline() -> None:
    """diffusers does not make that safe: calls may fail, but none gets an image out."""
    pipe = guarded()
    found: list[Any] = []

    def run(steps: int) -> None:
        for seed in range(3):
            try:
                found.append(pipe(**small.sdxl_arguments(steps=steps, seed=seed)).images)
            except Exception as error:
                found.append(error)

    threads = [threading.Thread(target=run, args=(steps,)) for steps in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert not any(images.any() for images in found if isinstance(images, np.ndarray))


def test_threads_that_share_one_guard_of_which_each_sees_its_own_call() -> None:
    guard = LatentGuard(policy(NEVER), XL)
    found: dict[int, tuple[int, int]] = {}
    barrier = threading.Barrier(3)

    def run(batch: int) -> None:
        pipe = guarded(guard)
        barrier.wait()
        pipe(**small.sdxl_arguments(batch, steps=batch + 1))
        barrier.wait()
        found[batch] = (len(guard.verdicts), len(guard.history))

    threads = [threading.Thread(target=run, args=(batch,)) for batch in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {batch: (batch, batch + 1) for batch in (1, 2, 3)}


def test_a_decode_in_another_thread() -> None:
    """What is decoded elsewhere during the loop is not part of the call; its end is."""
    previews: list[torch.Tensor] = []

    def preview(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        latents = given["latents"] / 0.13025
        worker = threading.Thread(target=lambda: previews.append(pipe.vae.decode(latents)[0]))
        worker.start()
        worker.join()
        return given

    pipe = guarded()
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=preview).images.any()
    assert torch.equal(previews[-1], pipe.vae.decode(torch.zeros(1, 4, 8, 8))[0])


# -- out of reach, and shown to be -------------------------------------------------------------


def test_a_pipeline_made_from_components_is_a_new_one() -> None:
    """It has its own attachment, which is empty and plain to see."""
    pipe = guarded()
    other = StableDiffusionXLImg2ImgPipeline(
        **pipe.components, requires_aesthetics_score=False, add_watermarker=False
    )
    assert other.callback_on_step_end is None
    assert isinstance(pipe.callback_on_step_end, LatentGuard)


def test_the_parts_used_by_hand_are_no_call_of_the_pipeline() -> None:
    pipe = guarded(LatentGuard(policy(ALWAYS, concept=FINAL_ONLY), XL))
    scheduler = DDIMScheduler(**small.BETAS)
    scheduler.set_timesteps(2)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents)[0]
    assert pipe.vae.decode(latents / 0.13025)[0].any()
    assert pipe.callback_on_step_end.verdicts == []
