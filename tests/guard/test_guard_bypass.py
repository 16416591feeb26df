"""Ways to get an unscored image out of a guarded pipeline: each is tried, and nothing comes out.

docs/threat-model.md lists them, with those of test_guard_changes.py and test_guard_attachment.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy
from guard_traps import FINAL_ONLY, XL, blocking, blocking_late, guarded, latents_of

from latentguard import LatentGuard, Latents, Scorer, optimize_noise
from latentguard.errors import LatentGuardError, LatentsError
from latentguard.guard import AuditLog, Budget, GenerationBlocked


def margin(tensor: torch.Tensor) -> float:
    scorer = Scorer(policy(), XL)
    return float(scorer.score(Latents(tensor, "sdxl", scaled=True)).margin[0, 0])


def choosy(allowed: torch.Tensor, forbidden: torch.Tensor) -> LatentGuard:
    """A guard that allows one image and blocks another, when they are finished."""
    low, high = margin(allowed), margin(forbidden)
    assert low < high
    text = policy(concept=FINAL_ONLY)
    concept = text.concepts[0].model_copy(
        update={"threshold": type(text.concepts[0].threshold)(margin=(low + high) / 2)}
    )
    return LatentGuard(text.model_copy(update={"concepts": (concept,)}), XL)


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """The latents that a seed leads to, and others that score higher."""
    made = latents_of(small.sdxl())
    return made, next(
        other
        for seed in range(100)
        if margin(other := torch.randn(made.shape, generator=torch.Generator().manual_seed(seed)))
        > margin(made) + 0.05
    )


# -- where the guard is put --------------------------------------------------------------------


def test_as_a_positional_argument() -> None:
    pipe, arguments = small.sdxl(), small.sdxl_arguments()
    signature = inspect.signature(StableDiffusionXLPipeline.__call__)
    names = list(signature.parameters)[1:]
    names = names[: names.index("callback_on_step_end") + 1]
    arguments["callback_on_step_end"] = blocking()
    positional = [arguments.get(name, signature.parameters[name].default) for name in names]
    assert not pipe(*positional)[0].any()


def test_none_in_the_call_does_not_detach() -> None:
    pipe = guarded()
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=None).images.any()


@pytest.mark.parametrize("name", ["callback", "ip_adapter_image", "cross_attention_kwargs"])
def test_a_guard_in_another_argument_is_refused(name: str) -> None:
    value: Any = {"guard": blocking()} if name == "cross_attention_kwargs" else blocking()
    with pytest.raises(LatentsError, match=f"as callback_on_step_end, not as {name}"):
        small.sdxl()(**small.sdxl_arguments(), **{name: value})


def test_a_guard_as_tensor_inputs_or_prompt_is_refused() -> None:
    with pytest.raises(LatentsError, match="not as callback_on_step_end_tensor_inputs"):
        small.sdxl()(**small.sdxl_arguments(), callback_on_step_end_tensor_inputs=[blocking()])
    with pytest.raises(LatentsError, match="not as prompt"):
        small.sdxl()(blocking(), **small.sdxl_arguments())


@pytest.mark.parametrize(
    "wrong", [lambda: LatentGuard, lambda: [blocking()]], ids=["class", "list"]
)
def test_a_class_or_a_list_in_place_of_a_guard_is_refused(wrong: Callable[[], Any]) -> None:
    pipe = small.sdxl()
    with pytest.raises((LatentsError, TypeError), match="callback_on_step_end must be"):
        pipe.callback_on_step_end = wrong()
    with pytest.raises(LatentsError, match="callback_on_step_end must be"):
        pipe(**small.sdxl_arguments(), callback_on_step_end=wrong())


@pytest.mark.parametrize("name", ["callback", "step_callback", "safety_checker"])
def test_a_guard_under_another_attribute_is_refused(name: str) -> None:
    pipe = small.sd1() if name == "safety_checker" else small.sdxl()
    with pytest.raises(LatentsError, match=f"as callback_on_step_end, not as {name}"):
        setattr(pipe, name, blocking())


@pytest.mark.parametrize("hidden", [lambda g: lambda *a: g(*a), lambda g: g.callback_fn])
def test_a_guard_hidden_in_a_function_ends_the_call(hidden: Callable[[Any], Any]) -> None:
    with pytest.raises(LatentsError, match="outside of a guarded call"):
        small.sdxl()(**small.sdxl_arguments(), callback_on_step_end=hidden(blocking()))


def test_a_nested_multi_callback() -> None:
    inner = MultiPipelineCallbacks([blocking_late()])
    outer = MultiPipelineCallbacks([inner])
    assert not small.sdxl()(**small.sdxl_arguments(), callback_on_step_end=outer).images.any()


# -- callbacks of the caller's own -------------------------------------------------------------


def test_a_callback_that_restores_what_was_blocked() -> None:
    kept: list[torch.Tensor] = []

    def restore(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        kept.append(given["latents"].clone())
        return {"latents": torch.ones_like(given["latents"])}

    guard = LatentGuard(policy(ALWAYS, extra="on_block: blank"), XL)
    for one in (guard, blocking_late()):
        pipe = guarded(one)
        output = pipe(**small.sdxl_arguments(2), callback_on_step_end=restore)
        assert not output.images.any()
    assert not kept[0].any()  # the first guard had blocked before the callback saw them


def test_a_callback_that_restores_one_image_of_a_batch(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Blocked at the first step, and put back at every step."""
    pipe = small.sdxl()
    plain = latents_of(pipe, batch=2)
    probe = LatentGuard(policy(action="observe"), XL)
    latents_of(pipe, batch=2, callback_on_step_end=probe)
    scores = [v.concepts[0].probability for v in probe.history[0].verdicts if v is not None]
    level = probe.history[0].noise_level
    rule = policy(sum(scores) / 2, concept=f"noise_window: [{level - 0.1}, {level + 0.1}]")
    flagged = int(scores[1] > scores[0])

    def restore(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        latents = given["latents"].clone()
        latents[flagged] = plain[flagged]
        return {"latents": latents}

    guard = LatentGuard(rule, XL)
    found = latents_of(guarded(guard), batch=2, callback_on_step_end=restore)
    assert not found[flagged].any()
    assert guard.verdicts[flagged].decision == "block"


@pytest.mark.parametrize("kind", ["sdxl", "lcm", "flux2"])
def test_a_callback_that_swaps_the_final_latents(kind: str) -> None:
    encoder = LinearEncoder(*{"sdxl": ("sdxl", 4), "lcm": ("sd1", 4), "flux2": ("flux2", 32)}[kind])
    make, arguments = getattr(small, kind), getattr(small, f"{kind}_arguments")
    name = "denoised" if kind == "lcm" else "latents"
    swapped: list[torch.Tensor] = []

    def swap(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            swapped.append(torch.randn_like(given[name]))
            given[name] = swapped[0]
        return given

    guard = LatentGuard(policy(action="observe"), encoder)
    pipe = guarded(guard, make)
    pipe(**arguments(callback_on_step_end=swap, callback_on_step_end_tensor_inputs=[name]))
    last = guard.history[-2:]
    assert [record.final for record in last] == [True, True]
    before, after = (record.verdicts[0].concepts[0].margin for record in last if record.verdicts[0])
    assert before != after
    size = (8, 16) if kind == "flux2" else (None, None)
    layout = "packed" if kind == "flux2" else "spatial"
    latents = Latents(swapped[0], pipe_space(guard), True, layout, *size)
    assert after == pytest.approx(float(Scorer(policy(), encoder).score(latents).margin), abs=1e-6)


def pipe_space(guard: LatentGuard) -> str:
    assert guard.last is not None
    return str(guard.last.identity["space"])


def test_a_callback_that_swaps_in_a_forbidden_image(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    made, forbidden = pair

    def swap(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": forbidden.clone()} if index == 3 else given

    pipe = guarded(choosy(made, forbidden))
    assert torch.equal(latents_of(pipe), made)
    assert not latents_of(pipe, callback_on_step_end=swap).any()
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=swap).images.any()


def test_a_callback_that_edits_the_final_latents_in_place(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    made, forbidden = pair

    def edit(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            given["latents"].copy_(forbidden)
        return given

    assert not latents_of(guarded(choosy(made, forbidden)), callback_on_step_end=edit).any()


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_a_tensor_that_is_edited_after_the_last_callback(
    pair: tuple[torch.Tensor, torch.Tensor], output_type: str
) -> None:
    made, forbidden = pair
    held: list[torch.Tensor] = []

    def hold(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        held.append(given["latents"])
        return given

    def edit(*args: Any, **kwargs: Any) -> None:
        held[-1].copy_(forbidden)

    pipe = guarded(choosy(made, forbidden))
    if output_type == "latent":
        pipe.maybe_free_model_hooks = edit  # runs between the loop and the return
    else:
        pipe.progress_bar = _editing_progress_bar(edit)  # left between the loop and the VAE
    arguments = small.sdxl_arguments(output_type=output_type, callback_on_step_end=hold)
    assert not pipe(**arguments).images.any()


def _editing_progress_bar(edit: Callable[[], None]) -> Any:
    """A progress bar that runs `edit` when the loop is left."""

    class Bar:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: Any) -> None:
            edit()

        def update(self) -> None:
            pass

    return Bar


def test_previews_of_a_callback_show_nothing_that_is_blocked() -> None:
    """Interfaces decode at each step; the finished image is judged before they get it."""
    previews = []

    def preview(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        previews.append(pipe.vae.decode(given["latents"] / 0.13025)[0])
        return given

    pipe = guarded(blocking_late())
    pipe(**small.sdxl_arguments(), callback_on_step_end=preview)
    black = pipe.vae.decode(torch.zeros(1, 4, 8, 8))[0]
    assert torch.equal(previews[-1], black)
    assert not torch.equal(previews[0], black)  # not scored at that noise: the policy says so


def test_a_callback_that_raises() -> None:
    def fails(*args: Any) -> dict[str, Any]:
        raise RuntimeError("mine")

    pipe = guarded()
    with pytest.raises(RuntimeError, match="mine"):
        pipe(**small.sdxl_arguments(), callback_on_step_end=fails)
    assert not pipe(**small.sdxl_arguments()).images.any()  # and the guard is still there


@pytest.mark.parametrize("rows", [1, 3])
def test_a_callback_that_changes_the_batch(rows: int) -> None:
    def resize(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.randn(rows, 4, 8, 8)} if index == 3 else given

    guard = LatentGuard(policy(action="observe"), XL)
    with pytest.raises(GenerationBlocked, match="2 of 2"):  # which row is whose is not known
        latents_of(guarded(guard), batch=2, callback_on_step_end=resize)
    assert "began with 2 images" in guard.verdicts[0].reason


@pytest.mark.parametrize("attached", [True, False])
def test_a_generation_within_a_callback_is_guarded_too(attached: bool) -> None:
    inner = []

    def nested(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if not inner:
            inner.append(None)
            scheduler = pipe.scheduler
            pipe.scheduler = DDIMScheduler(**small.BETAS)
            inner.append(pipe(**small.sdxl_arguments(seed=5)).images)
            pipe.scheduler = scheduler
        return given

    pipe, guard = small.sdxl(), blocking_late()
    callback: Any = nested
    if attached:
        pipe.callback_on_step_end = guard
    else:
        callback = MultiPipelineCallbacks([nested, guard])
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=callback).images.any()
    assert not inner[1].any()


def test_a_generation_within_that_of_another_pipeline_is_guarded_too() -> None:
    """By the guard of a call of the same pipeline, further out."""
    pipe, other, inner = small.sdxl(), small.sdxl(), []

    def again(*args: Any) -> Any:
        if not inner:
            inner.append(None)
            inner.append(other(**small.sdxl_arguments(), callback_on_step_end=within).images)
        return args[3]

    def within(*args: Any) -> Any:
        if len(inner) == 1:
            scheduler, pipe.scheduler = pipe.scheduler, DDIMScheduler(**small.BETAS)
            inner.append(pipe(**small.sdxl_arguments(seed=5)).images)
            pipe.scheduler = scheduler
        return args[3]

    callbacks = MultiPipelineCallbacks([again, blocking_late()])
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=callbacks).images.any()
    assert not inner[1].any()
    assert inner[2].any()  # the other pipeline has no guard
    assert pipe(**small.sdxl_arguments()).images.any()  # nor has this one any more


def test_the_search_for_a_noise_does_not_go_past_a_guard() -> None:
    pipe = guarded()
    arguments = small.sdxl_arguments(steps=1)
    del arguments["generator"], arguments["output_type"]
    options = {"model": XL, "iterations": 0, **arguments}
    with pytest.raises(LatentsError, match="optimize_noise would run past it"):
        optimize_noise(pipe, None, policy(), **options)
    plain = small.sdxl()
    with pytest.raises(LatentsError, match="optimize_noise would run past it"):
        optimize_noise(plain, None, policy(), **options, callback_on_step_end=blocking_late())
    found: list[Any] = []

    def search(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        found.append(optimize_noise(pipe, None, policy(), **options))
        return given

    callbacks = MultiPipelineCallbacks([search, blocking_late()])
    with pytest.raises(LatentsError, match="optimize_noise would run past it"):
        plain(**small.sdxl_arguments(), callback_on_step_end=callbacks)
    assert not found
    bare = type(pipe)(**pipe.components, add_watermarker=False)
    bare.set_progress_bar_config(disable=True)
    noise = optimize_noise(bare, None, policy(), **options).noise
    assert not latents_of(pipe, latents=noise).any()


def test_the_legacy_callback_sees_blanks() -> None:
    seen: list[torch.Tensor] = []
    pipe = guarded()
    with pytest.warns(FutureWarning, match="callback"):
        pipe(
            **small.sdxl_arguments(),
            callback=lambda i, t, latents: seen.append(latents.clone()),
            callback_steps=1,
        )
    assert len(seen) == 3  # the fourth step was blocked, and left before


# -- errors and values that are none -----------------------------------------------------------


@pytest.mark.parametrize("when", ["always", "at the end"])
def test_an_encoder_that_raises(when: str) -> None:
    class Broken(LinearEncoder):
        def features(self, latents: torch.Tensor, *args: Any) -> Any:
            if when == "always" or self.calls == 4:
                raise RuntimeError("out of memory")
            return super().features(latents, *args)

    encoder = Broken("sdxl", 4)
    guard = LatentGuard(policy(NEVER), encoder)
    pipe = guarded(guard)
    encoder.calls = 1
    assert not pipe(**small.sdxl_arguments()).images.any()
    assert guard.verdicts[0].decision == "block"
    assert "RuntimeError: out of memory" in (guard.verdicts[0].error or "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("action", ["block", "observe"])
def test_latents_that_are_no_numbers(value: float, action: str) -> None:
    guard = LatentGuard(policy(NEVER, action=action), XL)
    latents = torch.full((1, 4, 8, 8), value)
    output = guarded(guard)(**small.sdxl_arguments(), latents=latents)
    assert not output.images.any()
    assert guard.verdicts[0].decision == "block"
    assert guard.verdicts[0].error is not None


def test_one_image_of_nan_takes_no_other_with_it() -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = latents_of(small.sdxl(), batch=2, latents=noise)
    noise[0, 0, 0, 0] = float("nan")
    found = latents_of(guarded(LatentGuard(policy(NEVER), XL)), batch=2, latents=noise)
    assert not found[0].any()
    assert torch.equal(found[1], plain[1])


@pytest.mark.parametrize("signature", ["named", "handed on"])
def test_a_scheduler_that_hides_its_x0(signature: str) -> None:
    class Handing(DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().step(*args, **kwargs)
            return (result[0], "no tensor")

    class Named(DDIMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            result = super().step(model_output, timestep, sample, **kwargs)
            return (result[0], "no tensor")

    kind = Named if signature == "named" else Handing
    # A class reports its steps once a guarded call has met it: here the one that is handed on to.
    guarded(make=lambda: small.sdxl(scheduler=DDIMScheduler(**small.BETAS)))(
        **small.sdxl_arguments(steps=1)
    )
    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard, lambda: small.sdxl(scheduler=kind(**small.BETAS)))
    assert pipe(**small.sdxl_arguments(eta=0.0)).images.any()
    how = "epsilon" if signature == "named" else "scheduler"
    assert [record.estimate_source for record in guard.history[:3]] == [how] * 3


def test_a_scheduler_that_cannot_be_read_blocks() -> None:
    class Odd(DDIMScheduler):
        @property
        def alphas_cumprod(self) -> Any:
            if inspect.stack()[1].filename.endswith("denoised.py"):
                raise RuntimeError("no such numbers")
            return self._alphas

        @alphas_cumprod.setter
        def alphas_cumprod(self, value: Any) -> None:
            self._alphas = value

    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard, lambda: small.sdxl(scheduler=Odd(**small.BETAS)))
    assert not pipe(**small.sdxl_arguments()).images.any()
    assert "no such numbers" in guard.verdicts[0].reason


def test_a_timeout_blocks() -> None:
    guard = LatentGuard(policy(NEVER), XL, budget=Budget(timeout=0.0))
    assert not guarded(guard)(**small.sdxl_arguments()).images.any()
    assert "timeout" in guard.verdicts[0].reason


def test_a_spent_budget_leaves_the_final_latents_scored() -> None:
    guard = LatentGuard(policy(ALWAYS), XL, budget=Budget(scoring=0.0))
    assert not guarded(guard)(**small.sdxl_arguments()).images.any()
    assert [record.final for record in guard.history] == [True]


def test_an_audit_log_that_cannot_be_written_ends_the_call(tmp_path: Any) -> None:
    log = AuditLog(tmp_path / "logs" / "audit.jsonl")
    pipe = guarded(LatentGuard(policy(NEVER), XL, audit=log))
    assert pipe(**small.sdxl_arguments()).images.any()
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(OSError, match="audit"):
        pipe(**small.sdxl_arguments())


def test_a_schedule_that_leaves_steps_out_scores_the_end() -> None:
    rule = policy(ALWAYS, extra="schedule: {every: 100, noise: [1.0e+6, null]}")
    guard = LatentGuard(rule, XL)
    assert not guarded(guard)(**small.sdxl_arguments()).images.any()
    assert [record.final for record in guard.history] == [True]


def test_verdicts_that_are_put_off_are_made_in_time() -> None:
    """A policy that only observes judges at the end; what is no number blocks all the same."""

    def spoil(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] * float("nan")} if index == 3 else given

    guard = LatentGuard(policy(action="observe"), XL)
    assert not latents_of(guarded(guard), callback_on_step_end=spoil).any()
    assert len(guard.history) == 5


# -- the loop ----------------------------------------------------------------------------------


def test_interrupted_before_it_begins() -> None:
    pipe = guarded()
    pipe._interrupt = True
    assert not pipe(**small.sdxl_arguments()).images.any()


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("by", ["callback", "elsewhere"])
def test_interrupted_at_a_step(at: int, by: str) -> None:
    """What a loop that was left early would become is judged, by its x0."""
    pipe = small.sdxl()
    guard = blocking_late()
    pipe.callback_on_step_end = guard
    count = []

    def interrupt(pipe_: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe_._interrupt = pipe_._interrupt or index == at
        return given

    def hook(*args: Any) -> None:
        """As another thread might: just before the step at which the loop looks next."""
        count.append(1)
        pipe._interrupt = len(count) == at + 1

    more: dict[str, Any] = {}
    if by == "callback":
        more["callback_on_step_end"] = interrupt
    else:
        pipe.unet.register_forward_hook(hook)
    found = latents_of(pipe, **more)
    assert not found.any()
    assert guard.history[-1].final
    if at < 3:
        assert "scheduler" in [record.estimate_source for record in guard.history if record.final]


def test_interrupted_between_two_steps_by_another_thread() -> None:
    pipe = guarded()

    class Bar:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: Any) -> None:
            pass

        def update(self) -> None:  # after the callback of a step
            pipe._interrupt = True

    pipe.progress_bar = lambda *args, **kwargs: Bar()
    assert not latents_of(pipe).any()
    finals = [record for record in pipe.callback_on_step_end.history if record.final]
    assert finals[0].estimate_source == "scheduler"
    assert finals[0].noise_level > 1


def test_image_to_image_without_a_step() -> None:
    image = torch.rand(1, 3, small.SIZE, small.SIZE)
    pipe = guarded(make=small.img2img)
    for output_type in ("np", "latent"):
        try:
            output = pipe(
                **small.sdxl_arguments(output_type=output_type), image=image, strength=0.0
            )
        except ValueError:  # of diffusers, or of the guard for a batch of none
            continue
        assert not output.images.any()


def test_latents_given_to_image_to_image_are_judged() -> None:
    """4 channels count as latents, and few steps leave them as they are."""
    pipe = guarded(make=small.img2img)
    image = torch.randn(1, 4, 8, 8)
    output = pipe(**small.sdxl_arguments(output_type="latent"), image=image, strength=0.3)
    assert not output.images.any()


@pytest.mark.parametrize(
    "scheduler", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler]
)
@pytest.mark.parametrize("late", [False, True])
def test_schedulers_that_call_back_more_often_than_there_are_steps(
    scheduler: Any, late: bool
) -> None:
    guard = blocking_late() if late else blocking()
    pipe = guarded(guard, lambda: small.sdxl(scheduler=scheduler(**small.BETAS)))
    assert not pipe(**small.sdxl_arguments()).images.any()
    assert (len(guard.history) > 5) == late


def test_a_scheduler_that_is_changed_between_calls() -> None:
    pipe = guarded()
    for scheduler in (DDIMScheduler, EulerAncestralDiscreteScheduler):
        pipe.scheduler = scheduler(**small.BETAS)
        assert not pipe(**small.sdxl_arguments()).images.any()
    pipe.scheduler = IPNDMScheduler()
    with pytest.raises(LatentsError, match="IPNDMScheduler are not known"):
        pipe(**small.sdxl_arguments())


@pytest.mark.parametrize("kind", [DDIMScheduler, IPNDMScheduler])
def test_a_scheduler_that_is_changed_in_the_loop(kind: Any) -> None:
    other = kind()
    other.set_timesteps(4)

    def change(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            other.timesteps = pipe.scheduler.timesteps
            pipe.scheduler = other
        return given

    pipe = guarded()
    try:
        output = pipe(**small.sdxl_arguments(), callback_on_step_end=change)
    except (LatentsError, IndexError, RuntimeError, TypeError):
        return  # nothing came out at all
    assert not output.images.any()


@pytest.mark.parametrize("kind", ["sdxl", "flux2"])
def test_a_step_that_is_not_seen_is_told_by_the_latents_around_it(kind: str) -> None:
    encoder = XL if kind == "sdxl" else LinearEncoder("flux2", 32)
    make, arguments = getattr(small, kind), getattr(small, f"{kind}_arguments")
    steps = []
    for hidden in (False, True):
        guard = LatentGuard(policy(action="observe"), encoder)
        pipe = guarded(guard, make)
        if hidden:
            scheduler = pipe.scheduler
            scheduler.step = inspect.unwrap(type(scheduler).step).__get__(scheduler)
        pipe(**arguments())
        steps.append(guard.history)
    assert [record.estimate_source for record in steps[1]] == ["consecutive"] * 3 + ["latents"]
    for seen, told in zip(*steps, strict=True):
        assert told.noise_level == pytest.approx(seen.noise_level)
        a, b = (one.verdicts[0].concepts[0].margin for one in (seen, told) if one.verdicts[0])
        assert b == pytest.approx(a, abs=1e-5)  # worst seen 9e-8
    pipe.callback_on_step_end = LatentGuard(policy(ALWAYS, concept=FINAL_ONLY), encoder)
    assert not pipe(**arguments()).images.any()


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (EulerAncestralDiscreteScheduler(**small.BETAS), 0.0),
        (DPMSolverMultistepScheduler(**small.BETAS, algorithm_type="sde-dpmsolver++"), 0.0),
        (DDIMScheduler(**small.BETAS), 0.5),
    ],
    ids=["ancestral", "sde", "eta"],
)
def test_a_step_that_is_not_seen_and_adds_noise_blocks(scheduler: Any, eta: float) -> None:
    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard, lambda: small.sdxl(scheduler=scheduler))
    scheduler.step = inspect.unwrap(type(scheduler).step).__get__(scheduler)
    assert not pipe(**small.sdxl_arguments(eta=eta)).images.any()
    assert "was not seen, and" in guard.verdicts[0].reason
    assert "adds noise" in guard.verdicts[0].reason


# -- what is decoded, and by what --------------------------------------------------------------


@pytest.mark.parametrize("what", ["module", "method", "method before"])
def test_a_compiled_vae(what: str) -> None:
    pipe = small.sdxl()
    if what == "method before":
        pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    guard = blocking_late()
    pipe.callback_on_step_end = guard
    if what == "module":
        pipe.vae = torch.compile(pipe.vae, backend="eager")
    elif what == "method":
        pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    assert not pipe(**small.sdxl_arguments()).images.any()
    pipe.callback_on_step_end = LatentGuard(policy(action="observe"), XL)
    plain = small.sdxl()(**small.sdxl_arguments()).images
    assert np.allclose(pipe(**small.sdxl_arguments()).images, plain, atol=1e-5)


def test_a_vae_that_is_replaced_in_the_loop() -> None:
    def replace(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe.vae = small.autoencoder(4, 0.13025)
        return given

    assert not guarded()(**small.sdxl_arguments(), callback_on_step_end=replace).images.any()


def test_a_vae_of_another_space_is_noticed_at_the_next_call() -> None:
    pipe = guarded()
    pipe.vae = small.autoencoder(4, 0.18215)
    with pytest.raises(LatentGuardError, match="sd1"):
        pipe(**small.sdxl_arguments())


def test_a_decode_that_is_not_seen_gives_what_was_judged() -> None:
    pipe = guarded()
    pipe.vae.decode = inspect.unwrap(type(pipe.vae).decode).__get__(pipe.vae)
    assert not pipe(**small.sdxl_arguments()).images.any()


def test_a_decode_before_the_end_is_not_the_end() -> None:
    """A preview from within the model is judged; so is what a decode that is not seen draws."""

    class Bar(contextlib.nullcontext[Any]):
        def __enter__(self) -> Any:
            return self

        def update(self) -> None:  # after the callback of the first step
            pipe._interrupt = True

    pipe = small.sdxl()
    pipe.progress_bar = lambda *args, **kwargs: Bar()
    end = latents_of(pipe)
    drawn = (
        torch.randn(end.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(100)
    )
    preview = min(drawn, key=margin)
    pipe.callback_on_step_end = choosy(preview, end)

    def before(*args: Any) -> None:
        type(pipe.vae).decode(pipe.vae, preview)

    pipe.unet.register_forward_pre_hook(before)
    pipe.vae.decode = inspect.unwrap(type(pipe.vae).decode).__get__(pipe.vae)
    assert not pipe(**small.sdxl_arguments()).images.any()
    assert "never seen" in pipe.callback_on_step_end.verdicts[0].reason


def test_decoding_latents_by_hand_gives_nothing_of_the_image() -> None:
    pipe = guarded()
    latents = latents_of(pipe)
    assert not latents.any()
    decoded = [pipe.vae.decode(x / 0.13025)[0] for x in (latents, torch.zeros_like(latents))]
    assert torch.equal(*decoded)


def test_tiling_and_slicing_of_the_vae() -> None:
    pipe = guarded()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert not pipe(**small.sdxl_arguments(2)).images.any()


def test_base_and_refiner() -> None:
    """The base's noisy latents are judged by their x0; the refiner has a guard of its own."""
    base = guarded()
    assert not latents_of(base, denoising_end=0.5).any()
    refiner = guarded(make=small.img2img)
    noisy = latents_of(small.sdxl(), denoising_end=0.5)
    output = refiner(**small.sdxl_arguments(), image=noisy, denoising_start=0.5)
    assert not output.images.any()


# -- what is run -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["unwrapped", "replaced"])
def test_the_original_call_behind_the_guard(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = guarded()
    original = inspect.unwrap(StableDiffusionXLPipeline.__call__)
    if way == "replaced":
        monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", original)
    call = original.__get__(pipe) if way == "unwrapped" else pipe
    with pytest.raises(LatentsError, match="its loop runs outside of a guarded call"):
        call(**small.sdxl_arguments())


class _Dropping(StableDiffusionXLPipeline):
    """Loses the callback on the way to its parent class."""

    def __call__(self, *args: Any, callback_on_step_end: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("callback_on_step_end_tensor_inputs", None)
        return super().__call__(*args, **kwargs)


class _OwnLoop(StableDiffusionXLPipeline):
    """Never calls back."""

    def __call__(
        self,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        num_inference_steps: int = 4,
        output_type: str = "np",
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        **kwargs: Any,
    ) -> Any:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_output import (
            StableDiffusionXLPipelineOutput,
        )

        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, 4, 8, 8) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            self.scheduler.scale_model_input(latents, t)
            latents = self.scheduler.step(torch.randn_like(latents), t, latents)[0]
        if output_type == "latent":
            return StableDiffusionXLPipelineOutput(images=latents)
        image = self.vae.decode(latents / 0.13025, return_dict=False)[0].detach()
        return StableDiffusionXLPipelineOutput(images=image)


class _Stubborn(StableDiffusionXLPipeline):
    """Goes on whatever happens."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except Exception:
            return [torch.ones(1)]


def _of(cls: Any, guard: LatentGuard | None) -> Any:
    pipe = cls(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.callback_on_step_end = guard
    return pipe


@pytest.mark.parametrize("cls", [_Dropping, _OwnLoop])
@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_subclasses_that_never_call_back(cls: Any, output_type: str) -> None:
    pipe = _of(cls, blocking_late())
    assert not pipe(**small.sdxl_arguments(output_type=output_type)).images.any()


def test_a_subclass_that_loses_a_guard_of_the_call_is_withheld() -> None:
    pipe = _of(_Dropping, None)
    with pytest.raises(LatentsError, match="its output is withheld"):
        pipe(**small.sdxl_arguments(), callback_on_step_end=blocking())
    pipe.callback_on_step_end = LatentGuard(policy(NEVER), XL)
    with pytest.raises(LatentsError, match="its output is withheld"):
        pipe(**small.sdxl_arguments(), callback_on_step_end=blocking())
    pipe.callback_on_step_end = lambda pipe, index, timestep, given: given
    with pytest.raises(LatentsError, match="its output is withheld"):
        pipe(**small.sdxl_arguments(), callback_on_step_end=blocking())


def test_a_subclass_that_swallows_exceptions() -> None:
    pipe = _of(_Stubborn, blocking())
    assert not pipe(**small.sdxl_arguments()).images.any()
    pipe.callback_on_step_end = LatentGuard(policy(ALWAYS, extra="on_block: raise"), XL)
    with pytest.raises(LatentsError, match="withheld"):
        pipe(**small.sdxl_arguments())


def test_auto_pipelines_carry_the_guard_over() -> None:
    pipe = guarded()
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert other.callback_on_step_end is pipe.callback_on_step_end
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, small.SIZE, small.SIZE)
    assert not other(**small.sdxl_arguments(), image=image, strength=0.5).images.any()


def test_pickled_copies_are_guarded() -> None:
    """As servers make them that start workers."""
    pipe = guarded()
    pickle.loads(pickle.dumps(pipe.callback_on_step_end))
    other = pickle.loads(pickle.dumps(pipe))
    assert isinstance(other.callback_on_step_end, LatentGuard)
    assert not other(**small.sdxl_arguments()).images.any()
    assert not copy.copy(copy.deepcopy(other))(**small.sdxl_arguments()).images.any()


def test_a_loaded_pipeline_has_no_guard_and_shows_it(tmp_path: Any) -> None:
    """A policy is no part of the weights: out of reach, and plain to see."""
    pipe = guarded()
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path,
        **dict.fromkeys(
            ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        ),
    )
    loaded.set_progress_bar_config(disable=True)
    assert loaded.callback_on_step_end is None
    loaded.callback_on_step_end = blocking_late()
    assert not loaded(**small.sdxl_arguments()).images.any()


def test_a_component_swap_is_no_way_around() -> None:
    """Components of a guarded pipeline, in use by an unguarded one in another thread meanwhile."""
    pipe = guarded()
    other = StableDiffusionXLPipeline(
        **{**pipe.components, "scheduler": DDIMScheduler(**small.BETAS)}, add_watermarker=False
    )
    other.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {}

    def run(name: str, which: Any) -> None:
        found[name] = [which(**small.sdxl_arguments()).images for _ in range(3)]

    threads = [
        threading.Thread(target=run, args=arguments)
        for arguments in (("guarded", pipe), ("other", other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not np.stack(found["guarded"]).any()
    assert all(images.any() for images in found["other"])


def test_calls_from_a_server_that_is_asynchronous() -> None:
    pipes = [guarded(blocking_late()), guarded(LatentGuard(policy(NEVER), XL))]

    async def serve() -> list[Any]:
        calls = [asyncio.to_thread(lambda p=pipe: p(**small.sdxl_arguments())) for pipe in pipes]
        return await asyncio.gather(*calls)

    blocked, allowed = asyncio.run(serve())
    assert not blocked.images.any()
    assert allowed.images.any()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_under_modes_of_torch(mode: Any) -> None:
    rule = policy(ALWAYS, "steer", concept="steer: {iterations: 1}")
    pipe, guard = small.sdxl(), LatentGuard(rule, XL)
    with mode():  # the scorer is made in here
        assert not pipe(**small.sdxl_arguments(), callback_on_step_end=guard).images.any()
    assert [record.actions[0] for record in guard.history] == ["steered"] * 3 + ["blocked"]
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=guard).images.any()
    assert [record.actions[0] for record in guard.history] == ["steered"] * 3 + ["blocked"]


def test_every_image_of_every_prompt() -> None:
    pipe = guarded()
    images = pipe(**small.sdxl_arguments(2), num_images_per_prompt=2).images
    assert images.shape[0] == 4
    assert not images.any()


def test_a_block_that_raises_carries_no_image() -> None:
    pipe = guarded(LatentGuard(policy(ALWAYS, extra="on_block: raise", concept=FINAL_ONLY), XL))
    with pytest.raises(GenerationBlocked) as caught:
        pipe(**small.sdxl_arguments())
    assert not caught.value.output.images.any()
    assert caught.value.verdicts[0].decision == "block"


def test_a_replacement_that_fails_lets_nothing_out() -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no replacement")

    rule = policy(ALWAYS, extra="on_block: callback", concept=FINAL_ONLY)
    with pytest.raises(RuntimeError, match="no replacement"):
        guarded(LatentGuard(rule, XL, on_block=fails))(**small.sdxl_arguments())


def test_two_guards_of_which_one_blocks() -> None:
    first, second = LatentGuard(policy(NEVER), XL), blocking()
    pipe = guarded(MultiPipelineCallbacks([second, first]))
    assert not pipe(**small.sdxl_arguments()).images.any()
    assert len(first.history) == 1  # the rest was not computed
