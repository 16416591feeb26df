"""The guard in modular pipelines: as blocks of the loop and before the decoder."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers.modular_pipelines", reason="needs diffusers with modular pipelines")
import diffusers
import guard_modular as modular
from diffusers.modular_pipelines import (
    ComponentsManager,
    InputParam,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
    WanBlocks,
)
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy
from PIL import Image

from latentguard import LatentGuard
from latentguard.errors import LatentsError
from latentguard.guard import GenerationBlocked, GuardBlock, guarded_blocks
from latentguard.guard.blocks import find, guards_in_blocks

SPACES = {
    "sdxl": ("sdxl", 4),
    "flux": ("flux1", 16),
    "flux2": ("flux2", 32),
    "qwen": ("wan21", 16),
    "sd3": ("sd3", 16),
    "zimage": ("flux1", 16),
}
FAMILIES = ["sdxl", "flux", "flux2", "qwen"]
"""One of each form that loops and decoders hold latents in."""
PARTS = {family: modular.components(family) for family in SPACES}


def _guard(family: str, *given: Any, **more: Any) -> LatentGuard:
    extra = {key: more.pop(key) for key in ("extra", "concept") if key in more}
    return LatentGuard(policy(*given, **extra), LinearEncoder(*SPACES[family]), **more)


def _pipe(family: str, guard: LatentGuard | None = None, blocks: Any = None) -> Any:
    blocks = modular.BLOCKS[family]() if blocks is None else blocks
    return modular.pipeline(blocks if guard is None else guard.into(blocks), PARTS[family])


def _threshold_between(family: str, batch: int, **more: Any) -> tuple[float, list[bool]]:
    """A threshold that some of the images of a call reach, and which of them."""
    guard = _guard(family, NEVER, "observe")
    state = _pipe(family, guard)(**modular.inputs(family, batch, **more))
    found = [verdict.concepts[0].probability for verdict in state.latentguard.verdicts]
    ordered = sorted(found)
    middle = (ordered[len(found) // 2 - 1] + ordered[len(found) // 2]) / 2
    return middle, [value >= middle for value in found]


# -- what it is for ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", SPACES)
def test_images_that_nothing_matched_are_the_same_to_the_last_bit(family: str) -> None:
    plain = _pipe(family)(**modular.inputs(family, 2))
    guard = _guard(family, ALWAYS, "observe")
    state = _pipe(family, guard)(**modular.inputs(family, 2))
    assert np.array_equal(plain.images, state.images)
    assert torch.equal(plain.latents, state.latents)
    assert [record.final for record in state.latentguard.history] == [False, False, False, True]
    assert [verdict.decision for verdict in guard.verdicts] == ["allow", "allow"]
    assert all(verdict.matched for verdict in state.get("latentguard").verdicts)


@pytest.mark.parametrize(
    ("family", "form"), [*((family, "np") for family in SPACES), ("qwen", "pil"), ("sdxl", "pt")]
)
def test_a_call_that_is_blocked_as_a_whole_stops_at_once(family: str, form: str) -> None:
    plain = _pipe(family)(**modular.inputs(family, 2, output_type=form))
    guard = _guard(family, ALWAYS)
    state = _pipe(family, guard)(**modular.inputs(family, 2, output_type=form))
    assert type(state.images) is type(plain.images)
    assert np.shape(state.images[0]) == np.shape(plain.images[0])
    assert not any(np.any(np.asarray(image)) for image in state.images)
    assert not state.latents.any()
    assert len(state.latentguard.history) == 1
    assert [verdict.decision for verdict in state.latentguard.verdicts] == ["block", "block"]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_image_that_matched_is_blocked(family: str) -> None:
    plain = _pipe(family)(**modular.inputs(family, 4))
    # Of final latents alone, so that the threshold is that of what comes out.
    threshold, matched = _threshold_between(family, 4)
    guard = _guard(family, threshold, concept="noise_window: [0.0, 0.001]")
    state = _pipe(family, guard)(**modular.inputs(family, 4))
    decisions = [verdict.decision for verdict in state.latentguard.verdicts]
    assert [decision == "block" for decision in decisions] == matched
    for row, blocked in enumerate(matched):
        if blocked:
            assert not state.images[row].any()
        else:
            assert np.array_equal(state.images[row], plain.images[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_changes_the_latents_of_what_matched(family: str) -> None:
    plain = _pipe(family)(**modular.inputs(family))
    guard = _guard(family, ALWAYS, "steer")
    state = _pipe(family, guard)(**modular.inputs(family))
    steered = [record.actions[0] for record in state.latentguard.history]
    assert steered[:3] == ["steered"] * 3
    assert steered[3] == "blocked"  # it matches whatever it becomes
    assert not state.images.any()
    assert plain.images.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_that_are_asked_for_are_those_that_were_judged(family: str) -> None:
    asked = {"output_type": "latent"} if family in ("sdxl", "flux") else {}
    plain = _pipe(family)(output="latents", **modular.inputs(family, 2, **asked))
    pipe = _pipe(family, _guard(family, ALWAYS, "observe"))
    assert torch.equal(pipe(output="latents", **modular.inputs(family, 2, **asked)), plain)
    blocked = _pipe(family, _guard(family, ALWAYS))
    state = blocked(**modular.inputs(family, 2, **asked))
    assert not state.latents.any()
    assert not np.asarray(state.images).any()
    assert not blocked(output="latents", **modular.inputs(family, 2, **asked)).any()


def test_several_images_of_one_prompt_are_judged_one_by_one() -> None:
    guard = _guard("flux", ALWAYS, "observe")
    given = modular.inputs("flux", 2, num_images_per_prompt=2)
    got = _pipe("flux", guard)(output=["images", "latentguard"], **given)
    assert len(got["images"]) == len(got["latentguard"].verdicts) == 4
    blocked = _pipe("flux", _guard("flux", ALWAYS))(output="images", **given)
    assert blocked.shape == got["images"].shape
    assert not blocked.any()


def test_each_of_several_guards_judges() -> None:
    first, second = _guard("sdxl", NEVER), _guard("sdxl", ALWAYS)
    state = _pipe("sdxl", second, first.into(modular.sdxl_blocks()))(**modular.inputs("sdxl"))
    assert not state.images.any()
    assert [v.decision for v in first.verdicts], [v.decision for v in second.verdicts]
    assert second.verdicts[0].decision == "block"
    assert state.latentguard.verdicts[0].decision == "block"


def test_a_guard_that_is_put_in_twice_judges_once() -> None:
    guard = _guard("sdxl", NEVER)
    blocks = guarded_blocks(guard.into(modular.sdxl_blocks()), guard)
    state = _pipe("sdxl", None, blocks)(**modular.inputs("sdxl"))
    assert len(state.latentguard.history) == 4


def test_the_audit_log_and_requests_tell_of_modular_calls(tmp_path: Path) -> None:
    guard = _guard("sdxl", NEVER, audit=tmp_path / "audit.jsonl")
    pipe = _pipe("sdxl", guard)
    with guard.request("r1") as request:
        pipe(**modular.inputs("sdxl", 2))
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert {line["request_id"] for line in lines} == {"r1"}
    assert [verdict.decision for verdict in request.verdicts] == ["allow", "allow"]


def test_on_block_says_what_a_blocked_call_gives() -> None:
    guard = _guard("sdxl", ALWAYS, extra="on_block: raise")
    with pytest.raises(GenerationBlocked) as blocked:
        _pipe("sdxl", guard)(**modular.inputs("sdxl"))
    assert not blocked.value.output.images.any()
    assert blocked.value.output.latentguard.verdicts[0].decision == "block"
    ones = _guard(
        "sdxl",
        ALWAYS,
        extra="on_block: callback",
        on_block=lambda row, verdict, image: np.ones_like(image),
    )
    assert (_pipe("sdxl", ones)(output="images", **modular.inputs("sdxl")) == 1).all()


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("word", ["blur", "placeholder"])
def test_what_takes_the_place_of_what_is_blocked(family: str, word: str) -> None:
    more = {"placeholder": Image.new("RGB", (9, 9), "red")} if word == "placeholder" else {}
    guard = _guard(family, ALWAYS, extra=f"on_block: {word}", **more)
    state = _pipe(family, guard)(**modular.inputs(family, 2))
    assert state.images.any(axis=(1, 2, 3)).all()
    assert not state.latents.any()
    kinds = [outcome.kind for outcome in state.latentguard.outcomes]
    assert kinds == [{"blur": "blurred"}.get(word, word)] * 2


def test_what_is_blocked_is_generated_anew() -> None:
    ends = "noise_window: [0.0, 0.001]"
    probe = _guard("sdxl", ALWAYS, extra="on_block: {retry: 4}", concept=ends)
    pipe = _pipe("sdxl", probe)
    state = pipe(**modular.inputs("sdxl", steps=2))
    assert not state.images.any()
    (outcome,) = state.latentguard.outcomes
    assert [one.verdict.decision for one in outcome.attempts if one.verdict] == ["block"] * 4
    first = state.latentguard.history[1].verdicts[0].concepts[0].probability
    found = [one.verdict.concepts[0].probability for one in outcome.attempts if one.verdict]
    assert min(found) < first
    middle = (first + min(found)) / 2
    guard = _guard("sdxl", middle, extra="on_block: {retry: 4}", concept=ends)
    state = _pipe("sdxl", guard)(**modular.inputs("sdxl", steps=2))
    (outcome,) = state.latentguard.outcomes
    assert outcome.kind == "retried"
    assert guard.verdicts == list(state.latentguard.verdicts)
    generator = torch.Generator().manual_seed(outcome.attempts[-1].seed or 0)
    plain = _pipe("sdxl")(**{**modular.inputs("sdxl", steps=2), "generator": generator})
    assert np.array_equal(plain.images, state.images)
    assert torch.equal(plain.latents, state.latents)


def test_in_a_batch_only_what_was_blocked_is_taken() -> None:
    ends = "noise_window: [0.0, 0.001]"
    threshold, matched = _threshold_between("sdxl", 4, steps=2)
    plain = _pipe("sdxl")(**modular.inputs("sdxl", 4, steps=2))
    guard = _guard("sdxl", threshold, extra="on_block: {retry: 2}", concept=ends)
    state = _pipe("sdxl", guard)(**modular.inputs("sdxl", 4, steps=2))
    kinds = [outcome.kind for outcome in state.latentguard.outcomes]
    for row, blocked in enumerate(matched):
        assert (kinds[row] == "allowed") != blocked
        assert state.images[row].any() == (kinds[row] != "blanked")
        assert state.latents[row].any() == (kinds[row] != "blanked")
        assert np.array_equal(state.images[row], plain.images[row]) != blocked


def test_the_record_is_among_the_outputs_that_blocks_name() -> None:
    blocks = _guard("sdxl", NEVER).into(modular.sdxl_blocks())
    assert "latentguard" in [output.name for output in blocks.intermediate_outputs]


# -- what a guard cannot go into ---------------------------------------------------------------


def test_blocks_without_a_loop_are_refused() -> None:
    blocks = modular.sdxl_blocks()
    core = blocks.sub_blocks["denoise"]
    core.sub_blocks.pop("denoise")
    with pytest.raises(LatentsError, match="no denoising loop was found"):
        _guard("sdxl", NEVER).into(blocks)
    with pytest.raises(LatentsError, match="no denoising loop was found"):
        _guard("sdxl", NEVER).into(modular.sdxl_blocks().sub_blocks["vae_encoder"])


class _Decoder(modular.Decoder):
    """One that names its images otherwise."""

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("pictures")]


def test_blocks_with_a_decoder_that_is_not_known_are_refused() -> None:
    blocks = modular.sdxl_blocks()
    blocks.sub_blocks["decode"] = _Decoder()
    with pytest.raises(LatentsError, match=r"'decode' .* has the VAE after the loop"):
        _guard("sdxl", NEVER).into(blocks)


def test_blocks_of_latents_whose_form_is_not_known_are_refused() -> None:
    with pytest.raises(LatentsError, match=r"of model 'wan'\) is not known; known are"):
        _guard("flux", NEVER).into(WanBlocks())


def _modular_classes() -> list[Any]:
    names = [name for name in dir(diffusers) if name.endswith("ModularPipeline")]
    return [getattr(diffusers, name) for name in names if name != "ModularPipeline"]


def test_each_modular_pipeline_of_diffusers_is_guarded_or_refused_by_a_sentence() -> None:
    guard, taken, said = _guard("sdxl", NEVER), set(), []
    for cls in _modular_classes():
        blocks = getattr(diffusers, cls.default_blocks_name)()
        try:
            found = find(guard.into(blocks))
        except LatentsError as error:
            said.append(str(error))
        else:
            assert found.loops
            assert found.decoders
            taken.add(cls.__name__.removesuffix("ModularPipeline"))
    families = {"StableDiffusionXL", "StableDiffusion3", "Flux", "FluxKontext", "Flux2"}
    families |= {"Flux2Klein", "Flux2KleinBase", "ZImage"}
    families |= {"QwenImage", "QwenImageEdit", "QwenImageEditPlus"}
    assert taken == families
    assert len(said) == len(_modular_classes()) - len(taken)
    refusal = "is not known; known are|no denoising loop was found"
    assert [sentence for sentence in said if not re.search(refusal, sentence)] == []


@pytest.mark.parametrize("what", ["pipeline", "model", "class"])
def test_a_guard_goes_into_blocks_alone(what: str) -> None:
    guard = _guard("sdxl", NEVER)
    if what == "class":
        blocks = guard.into(type(modular.sdxl_blocks()))
        assert "latentguard" in [output.name for output in blocks.intermediate_outputs]
        return
    given = _pipe("sdxl") if what == "pipeline" else PARTS["sdxl"]["vae"]
    with pytest.raises(LatentsError, match=r"a guard goes into ModularPipelineBlocks.*guard\.into"):
        guard.into(given)


def test_a_guard_block_without_a_guard_is_refused() -> None:
    with pytest.raises(LatentsError, match="takes one LatentGuard or more, got nothing"):
        GuardBlock()


def test_tokens_that_no_block_unpacks_are_refused() -> None:
    blocks = modular.flux_blocks()
    blocks.sub_blocks["denoise"].sub_blocks.pop("unpack_latents")
    with pytest.raises(LatentsError, match=r"no block after the loop .* is known to unpack"):
        _pipe("flux", _guard("flux", NEVER), blocks)(**modular.inputs("flux"))


def test_a_space_that_is_not_the_pipelines_is_refused() -> None:
    guard = LatentGuard(policy(NEVER), LinearEncoder("sd3", 16), space="sd3")
    with pytest.raises(LatentsError, match="space is given as sd3, but the VAE"):
        _pipe("flux", guard)(**modular.inputs("flux"))


# -- where a guard would do nothing ------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        *("attribute", "list", "update", "guider", "register", "callback", "call", "state"),
        *("manager", "blocks", "sub_blocks"),
    ],
)
def test_a_guard_where_it_would_do_nothing_is_refused(way: str) -> None:
    guard, pipe = _guard("sdxl", NEVER), _pipe("sdxl")
    given = modular.inputs("sdxl")
    state = PipelineState()
    state.set("guard", guard)
    ways: dict[str, Any] = {
        "attribute": lambda: setattr(pipe, "guard", guard),
        "list": lambda: setattr(pipe, "callbacks", [guard]),
        "update": lambda: pipe.update_components(guard=guard),
        "guider": lambda: pipe.update_components(guider=guard),
        "register": lambda: pipe.register_components(guard=guard),
        "callback": lambda: setattr(pipe, "callback_on_step_end", guard),
        "call": lambda: pipe(callback_on_step_end=guard, **given),
        "state": lambda: pipe(state=state, **given),
        "manager": lambda: ComponentsManager().add("guard", guard),
        "blocks": lambda: setattr(pipe._blocks, "guard", guard),
        "sub_blocks": lambda: setattr(pipe._blocks, "sub_blocks", {"guard": guard}),
    }
    with pytest.raises(LatentsError, match=r"guard\.into\(blocks\)\.init_pipeline"):
        ways[way]()


def test_components_and_attributes_of_other_kinds_are_taken() -> None:
    pipe = _pipe("sdxl")
    pipe.note = "mine"
    assert pipe.note == "mine"
    pipe.callback_on_step_end = print  # diffusers does not look at it
    assert pipe.callback_on_step_end is print
    guider = pipe.guider.new(guidance_scale=3.0)
    pipe.update_components(guider=guider)
    assert pipe.guider is guider


# -- ways around it ----------------------------------------------------------------------------


def _loop(blocks: Any) -> Any:
    """The denoising loop of SDXL's text-to-image blocks."""
    loop = blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks["denoise"]
    return loop.sub_blocks.get("denoise", loop)


def test_guarded_blocks_that_are_called_by_themselves_are_refused() -> None:
    pipe = _pipe("sdxl", _guard("sdxl", NEVER))
    state = PipelineState()
    for name, value in {**pipe.default_call_parameters, **modular.inputs("sdxl")}.items():
        state.set(name, value)
    with pytest.raises(LatentsError, match="guarded blocks were called by themselves"):
        pipe._blocks(pipe, state)


@pytest.mark.parametrize("where", ["loop", "before the loop", "decoder", "whole loop"])
def test_a_guards_block_that_is_taken_out_is_missed(where: str) -> None:
    guard = _guard("sdxl", NEVER)
    blocks = guard.into(modular.sdxl_blocks())
    auto = blocks.sub_blocks["denoise"].sub_blocks["denoise"]
    if where == "loop":
        _loop(blocks).sub_blocks.pop("latentguard")
    elif where == "before the loop":
        auto.sub_blocks["denoise"].sub_blocks.pop("latentguard")
    elif where == "decoder":
        blocks.sub_blocks["decode"].sub_blocks["non-inpaint"].sub_blocks.pop("latentguard")
    else:
        auto.sub_blocks["denoise"] = _loop(modular.sdxl_blocks())
    with pytest.raises(LatentsError, match=r"no block of the guard stands (last in|before) '"):
        _pipe("sdxl", None, blocks)(**modular.inputs("sdxl"))


class _Change(ModularPipelineBlocks):
    """A block of the user's, in a loop or in a sequence, that changes the latents."""

    model_name = "stable-diffusion-xl"

    def __init__(self, change: Any) -> None:
        super().__init__()
        self._change = change

    @property
    def inputs(self) -> list[Any]:
        return [InputParam("latents")]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("latents")]

    def __call__(self, components: Any, state: Any, **kwargs: Any) -> Any:
        if isinstance(state, PipelineState):
            state.set("latents", self._change(components, state.get("latents")))
        else:
            state.latents = self._change(components, state.latents)
        return components, state


def test_a_block_after_the_guards_in_the_loop_is_refused() -> None:
    blocks = _guard("sdxl", NEVER).into(modular.sdxl_blocks())
    _loop(blocks).sub_blocks["mine"] = _Change(lambda pipe, latents: latents + 1)
    with pytest.raises(LatentsError, match="put the guard in last"):
        _pipe("sdxl", None, blocks)(**modular.inputs("sdxl"))


def test_a_block_between_the_guards_and_the_decoder_is_refused() -> None:
    blocks = _guard("sdxl", NEVER).into(modular.sdxl_blocks())
    pair = blocks.sub_blocks["decode"].sub_blocks["non-inpaint"]
    pair.sub_blocks.insert("mine", _Change(lambda pipe, latents: latents + 1), 1)
    with pytest.raises(LatentsError, match="put the guard in last"):
        _pipe("sdxl", None, blocks)(**modular.inputs("sdxl"))


@pytest.mark.parametrize("way", ["new", "in place"])
def test_latents_that_are_changed_after_the_loop_are_judged_again(way: str) -> None:
    def change(pipe: Any, latents: Any) -> Any:
        return latents.mul_(-1) if way == "in place" else -latents

    plain = modular.sdxl_blocks()
    plain.sub_blocks.insert("mine", _Change(change), 2)
    threshold, matched = _threshold_between("sdxl", 4)
    guard = _guard("sdxl", threshold, concept="noise_window: [0.0, 0.001]")
    state = _pipe("sdxl", guard, plain)(**modular.inputs("sdxl", 4))
    history = state.latentguard.history
    assert sum(record.final for record in history) == 2
    for row, blocked in enumerate(matched):
        assert not blocked or not state.images[row].any()


def test_a_block_in_the_loop_that_changes_latents_is_seen() -> None:
    blocks = modular.sdxl_blocks()
    _loop(blocks).sub_blocks["mine"] = _Change(lambda pipe, latents: latents * float("nan"))
    guard = _guard("sdxl", NEVER)
    state = _pipe("sdxl", guard, blocks)(**modular.inputs("sdxl"))
    assert state.latentguard.verdicts[0].decision == "block"
    assert not state.images.any()


def test_what_a_block_decodes_by_the_pipelines_vae_is_judged() -> None:
    seen = []

    def preview(pipe: Any, latents: Any) -> Any:
        seen.append(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)
        return latents

    blocks = modular.sdxl_blocks()
    _loop(blocks).sub_blocks["mine"] = _Change(preview)
    _pipe("sdxl", _guard("sdxl", ALWAYS), blocks)(**modular.inputs("sdxl"))
    empty = PARTS["sdxl"]["vae"].decode(torch.zeros(1, 4, 8, 16)).sample
    assert len(seen) == 1
    assert torch.equal(seen[0], empty)


def test_images_that_nothing_was_seen_decoding_are_withheld() -> None:
    class Own(modular.Decoder):
        def __call__(self, components: Any, state: Any) -> Any:
            vae = components.vae
            hidden = vae.decoder(vae.post_quant_conv(state.get("latents")))
            state.set("images", hidden.permute(0, 2, 3, 1).numpy())
            return components, state

    blocks = modular.sdxl_blocks()
    blocks.sub_blocks["decode"] = Own()
    state = _pipe("sdxl", _guard("sdxl", NEVER), blocks)(**modular.inputs("sdxl"))
    assert "what was decoded was never seen" in state.latentguard.verdicts[0].reason
    assert not state.images.any()


def test_a_vae_that_a_block_exchanges_is_watched() -> None:
    class Other(type(PARTS["sdxl"]["vae"])):  # type: ignore[misc]
        def decode(self, z: Any, *args: Any, **kwargs: Any) -> Any:
            return super().decode(z * 2, *args, **kwargs)

    other = Other.from_config(PARTS["sdxl"]["vae"].config)

    def swap(pipe: Any, latents: Any) -> Any:
        pipe.update_components(vae=other)
        return latents

    blocks = modular.sdxl_blocks()
    blocks.sub_blocks.insert("mine", _Change(swap), 2)
    state = _pipe("sdxl", _guard("sdxl", NEVER), blocks)(**modular.inputs("sdxl"))
    assert sum(record.final for record in state.latentguard.history) == 2


def test_latents_under_another_name_are_judged() -> None:
    class Copy(_Change):
        @property
        def intermediate_outputs(self) -> list[Any]:
            return [OutputParam("mine")]

        def __call__(self, components: Any, state: Any, **kwargs: Any) -> Any:
            state.set("mine", state.get("latents") + 1)
            return components, state

    blocks = modular.sdxl_blocks()
    blocks.sub_blocks.insert("mine", Copy(None), 2)
    state = _pipe("sdxl", _guard("sdxl", NEVER), blocks)(**modular.inputs("sdxl"))
    assert torch.equal(state.mine, state.latents + 1)
    assert sum(record.final for record in state.latentguard.history) == 2
    threshold, matched = _threshold_between("sdxl", 4)
    guard = _guard("sdxl", threshold, concept="noise_window: [0.0, 0.001]")
    state = _pipe("sdxl", guard, blocks)(**modular.inputs("sdxl", 4))
    for row, blocked in enumerate(matched):
        assert not blocked or not state.mine[row].any()


def test_latents_of_another_number_than_were_judged_are_withheld() -> None:
    for change in (lambda _, latents: torch.cat([latents, latents]), lambda _, x: x[1:]):
        blocks = modular.sdxl_blocks()
        blocks.sub_blocks.insert("mine", _Change(change), 2)
        with pytest.raises(GenerationBlocked, match="this session began with 2 images"):
            _pipe("sdxl", _guard("sdxl", NEVER), blocks)(**modular.inputs("sdxl", 2))


@pytest.mark.parametrize("way", ["no steps", "skips the guard", "ignores the guard"])
def test_a_loop_that_keeps_its_latents_from_the_guard_is_judged_at_its_end(way: str) -> None:
    class Own(type(_loop(modular.sdxl_blocks()))):  # type: ignore[misc]
        def loop_step(self, components: Any, state: Any, **kwargs: Any) -> Any:
            if way == "ignores the guard":
                components, state = super().loop_step(components, state, **kwargs)
                state.latents = state.latents + 1
                return components, state
            for name, block in self.sub_blocks.items():
                if name != "latentguard":
                    components, state = block(components, state, **kwargs)
            return components, state

        def __call__(self, components: Any, state: Any) -> Any:
            if way == "no steps":
                state.set("timesteps", state.get("timesteps")[:0])
            return super().__call__(components, state)

    blocks = modular.sdxl_blocks()
    blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks["denoise"] = Own()
    state = _pipe("sdxl", _guard("sdxl", NEVER), blocks)(**modular.inputs("sdxl"))
    finals = [record.final for record in state.latentguard.history]
    assert finals == ([False] * 3 + [True] * 2 if way == "ignores the guard" else [True])
    state = _pipe("sdxl", _guard("sdxl", ALWAYS), blocks)(**modular.inputs("sdxl"))
    assert not state.images.any()


def test_what_is_decoded_in_another_thread_is_withheld() -> None:
    class Threaded(modular.Decoder):
        def __call__(self, components: Any, state: Any) -> Any:
            with ThreadPoolExecutor(1) as threads:
                images = threads.submit(components.vae.decode, state.get("latents")).result()
            state.set("images", images.sample.permute(0, 2, 3, 1).detach().numpy())
            return components, state

    blocks = modular.sdxl_blocks()
    blocks.sub_blocks["decode"] = Threaded()
    state = _pipe("sdxl", _guard("sdxl", NEVER), blocks)(**modular.inputs("sdxl"))
    assert "what was decoded was never seen" in state.latentguard.verdicts[0].reason
    assert not state.images.any()


@pytest.mark.parametrize("family", ["flux2", "qwen"])
def test_half_precision_is_judged_once(family: str) -> None:
    half = torch.bfloat16
    parts = {
        name: part.to(half) if isinstance(part, torch.nn.Module) else part
        for name, part in modular.components(family).items()
    }
    guard, found = _guard(family, ALWAYS, "observe"), []
    for blocks in (modular.BLOCKS[family](), guard.into(modular.BLOCKS[family]())):
        given = {
            name: value.to(half)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in modular.inputs(family).items()
        }
        found.append(modular.pipeline(blocks, parts)(**given))
    assert np.array_equal(found[0].images, found[1].images)
    assert [record.final for record in found[1].latentguard.history] == [False] * 3 + [True]


# -- parts of pipelines ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_that_only_decodes_judges_what_it_is_given(family: str) -> None:
    latents = _pipe(family)(**modular.inputs(family, output_type="pt")).latents
    if family == "qwen":  # its decoder leaves raw ones
        latents = torch.randn_like(latents)
    given = {"latents": latents, "output_type": "np"}
    decode = modular.BLOCKS[family]().sub_blocks["decode"]
    plain = _pipe(family, None, decode)(**given)
    state = _pipe(family, _guard(family, ALWAYS, "observe"), decode)(**given)
    assert np.array_equal(plain.images, state.images)
    assert [record.final for record in state.latentguard.history] == [True]
    blocked = _pipe(family, _guard(family, ALWAYS), decode)(output="images", **given)
    assert blocked.shape == plain.images.shape
    assert not blocked.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_that_only_denoises_gives_judged_latents(family: str) -> None:
    denoise = modular.BLOCKS[family]().sub_blocks["denoise"]
    given = {k: v for k, v in modular.inputs(family).items() if k != "output_type"}
    space = SPACES[family][0]  # blocks that only denoise have no VAE that tells it
    plain = _pipe(family, None, denoise)(output="latents", **given)
    given["generator"] = torch.Generator().manual_seed(0)
    guard = LatentGuard(policy(NEVER), LinearEncoder(*SPACES[family]), space=space)
    got = _pipe(family, guard, denoise)(**given)
    assert torch.equal(plain, got.latents)
    assert got.latentguard.history[-1].final
    block = LatentGuard(policy(ALWAYS), LinearEncoder(*SPACES[family]), space=space)
    assert not _pipe(family, block, denoise)(output="latents", **given).any()


def test_parts_of_guarded_blocks_are_guarded() -> None:
    blocks = _guard("flux", ALWAYS).into(modular.flux_blocks())
    decode = blocks.sub_blocks.pop("decode")
    latents = torch.randn(1, 16, 8, 16)
    images = _pipe("flux", None, decode)(latents=latents, output_type="np", output="images")
    assert images.shape == (1, 64, 128, 3)
    assert not images.any()


@pytest.mark.parametrize("task", ["text2image", "image2image", "inpainting"])
def test_every_workflow_of_guarded_blocks_is_guarded(task: str) -> None:
    from PIL import Image

    guard = _guard("sdxl", ALWAYS)
    blocks = guard.into(modular.sdxl_blocks())
    given = modular.inputs("sdxl", output_type="pil")
    image = Image.new("RGB", (128, 64), "red")
    if task != "text2image":
        given.update(image=image, strength=0.9)
        del given["height"], given["width"]
    if task == "inpainting":
        given["mask_image"] = Image.new("L", (128, 64), 255)
    workflow = {k: True for k in ("image", "mask_image") if k in given}
    chosen = blocks.get_execution_blocks(**workflow)
    for tree in (blocks, chosen):
        state = _pipe("sdxl", None, tree)(**given)
        assert not np.asarray(state.images[0]).any()
        assert state.latentguard.verdicts[0].decision == "block"


def test_a_state_of_an_earlier_call_can_be_gone_on_from() -> None:
    guard = _guard("flux", NEVER)
    pipe = _pipe("flux", guard)
    first = pipe(**modular.inputs("flux"))
    again = modular.inputs("flux", output_type="np")
    second = pipe(state=first, latents=None, generator=again["generator"])
    assert np.array_equal(first.images, second.images)
    assert first.latentguard.request_id != second.latentguard.request_id


def test_ids_that_unpack_the_tokens_otherwise_are_judged_as_decoded() -> None:
    class Shuffle(_Change):
        model_name = "flux2"

        def __call__(self, components: Any, state: Any, **kwargs: Any) -> Any:
            state.set("latent_ids", state.get("latent_ids").flip(1))
            return components, state

    blocks = modular.flux2_blocks()
    core = blocks.sub_blocks["denoise"].sub_blocks["text2image"]
    names = list(core.sub_blocks)
    core.sub_blocks.insert("mine", Shuffle(None), names.index("denoise") + 1)
    state = _pipe("flux2", _guard("flux2", NEVER), blocks)(**modular.inputs("flux2"))
    assert sum(record.final for record in state.latentguard.history) == 2


def test_blocks_in_a_sequence_of_ones_own_are_guarded() -> None:
    inner = modular.sdxl_blocks()
    outer = SequentialPipelineBlocks.from_blocks_dict({"whole": inner})
    state = _pipe("sdxl", _guard("sdxl", ALWAYS), outer)(**modular.inputs("sdxl"))
    assert not state.images.any()


def test_a_loaded_modular_pipeline_has_no_guard_and_shows_it(tmp_path: Path) -> None:
    pipe = _pipe("sdxl", _guard("sdxl", NEVER))
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    loaded = ModularPipeline.from_pretrained(str(tmp_path))
    assert guards_in_blocks(pipe.blocks)
    assert not guards_in_blocks(loaded.blocks)
    assert "latentguard" not in [output.name for output in loaded.blocks.intermediate_outputs]


def test_pipelines_without_a_guard_are_left_alone() -> None:
    pipe = _pipe("sdxl")
    state = pipe(**modular.inputs("sdxl"))
    assert "latentguard" not in state.values
    with pytest.warns(UserWarning, match="Unexpected input"):
        pipe(nothing=1, **modular.inputs("sdxl"))
