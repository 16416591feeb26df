"""Every pipeline class of the installed diffusers is guarded, or refused when a guard is attached;
and those that are guarded are read as they read themselves."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import diffusers
import every_run
from diffusers.configuration_utils import FrozenDict
from every_pipeline import PAGE, decoder, every_class, every_row, guard_for, page, shortly
from guard_helpers import ALWAYS, LinearEncoder, policy
from guard_traps import FINAL_ONLY

from latentguard import LatentGuard, Latents, LatentSpace
from latentguard.encoders import Features, best_encoder
from latentguard.errors import GuardError
from latentguard.files import load_latents
from latentguard.guard.attachment import ignores_answers
from latentguard.guard.forms import tokens_by_cell
from latentguard.guard.tensors import plain
from latentguard.spaces import SPACES

EXAMPLES = Path(__file__).parents[2] / "examples" / "latents.pt"
# One of each VAE and form of latents; with the others it is the same again.
FIRST = (
    *("BriaFiboPipeline", "BriaPipeline", "ErnieImagePipeline", "Ideogram4Pipeline"),
    *("Kandinsky5T2IPipeline", "PRXPipeline", "QwenImagePipeline", "SanaPipeline"),
    *("StableDiffusionPipeline", "ZImagePipeline"),
)
# Read from the page, which is held to what happens below: asking every class takes seconds.
GUARDED = re.findall(r"^\| (\w+) \|.*\| (?:bundled|own) model \|", PAGE.read_text("utf-8"), re.M)
RUN = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.slow)
    for name in GUARDED
    if name not in every_run.NEEDS_MORE
]
# Those of the README, as far as a model comes with the package.
LISTED = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "Flux2", "QwenImage")
WITH_MODEL = re.findall(r"^\| (\w+) \|.*\| bundled model \|", PAGE.read_text("utf-8"), re.M)
SIMPLE = [f"{name}Pipeline" for name in (*LISTED, "ZImage")]

# Decodes without the shift that it denoises with, so that what it decodes is judged once more.
DECODES_OTHERWISE = ("StableDiffusion3InpaintPipeline",)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Spaces that a guard makes known here are not known to other tests."""
    before = set(SPACES)
    yield
    for name in set(SPACES) - before:
        del SPACES[name]


class Noting(LinearEncoder):
    """Keeps what it was shown last."""

    seen: torch.Tensor

    def features(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Features:
        self.seen = latents.detach().clone()
        return super().features(latents, *args, **kwargs)


class Watched:
    """A guarded pipeline."""

    def __init__(self, name: str, **more: Any) -> None:
        self.cls = every_class()[name]
        self.pipe = every_run.pipeline(self.cls)
        self.guard, self.space = guard_for(self.pipe, **more)
        self.pipe.callback_on_step_end = self.guard

    def __call__(self, **more: Any) -> Any:
        return images_of(self.pipe(**every_run.arguments(self.cls, self.pipe, **more)))


def images_of(output: Any) -> Any:
    found = output.images if hasattr(output, "images") else output.image
    return np.stack([np.asarray(image) for image in found]) if isinstance(found, list) else found


def bare(name: str, **more: Any) -> Any:
    """What a pipeline returns without a guard."""
    cls = every_class()[name]
    pipe = every_run.pipeline(cls)
    return images_of(pipe(**every_run.arguments(cls, pipe, **more)))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one.shape == other.shape and bool((one == other).all())


def test_every_class_is_guarded_or_refused_in_one_sentence() -> None:
    rows = every_row()
    assert len(rows) > 250
    for row in rows:
        if row.state == "refused":
            assert row.said.count("\n") == 0
            assert shortly(row.said)
            assert row.name in row.said or "Scheduler are not known" in row.said
    states = {row.name: row.state for row in rows}
    assert states["StableDiffusionXLPipeline"] == states["Flux2Pipeline"] == "bundled"
    assert states["QwenImagePipeline"] != "refused"
    assert states["WanPipeline"] == "refused"


def test_the_page_tells_what_happens() -> None:
    text = PAGE.read_text(encoding="utf-8")
    written_for = re.search(r"diffusers ([0-9][0-9.]*[0-9])", text)
    assert written_for is not None
    if written_for[1] != diffusers.__version__:
        pytest.skip(f"needs diffusers {written_for[1]}, which constraints.txt pins")
    assert text == page(every_row()), "run make pipelines"


def test_what_ignores_answers_is_known() -> None:
    """Told by their code: what a callback returns is kept nowhere."""
    for name in GUARDED:
        cls = every_class()[name]
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.__call__))))
        dropped = any(
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "callback_on_step_end"
            for node in ast.walk(tree)
        )
        assert dropped == ignores_answers(cls), name


@pytest.mark.parametrize("name", RUN)
def test_observing_changes_no_bit(name: str) -> None:
    watched = Watched(name)
    for form in ("np", "latent"):
        assert same(bare(name, output_type=form), watched(output_type=form))
        assert [verdict.error for verdict in watched.guard.verdicts] == [None]
        steps = watched.guard.history
        assert all(v is not None and v.error is None for step in steps for v in step.verdicts)
        assert len(steps) > 1
        assert steps[-1].final


@pytest.mark.parametrize("name", RUN)
def test_the_guard_reads_what_the_pipeline_decodes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(name, encoder=Noting)
    encoder: Any = watched.guard._model
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    decode = type(decoder(watched.pipe)).decode

    def noted(self: Any, z: Any, *args: Any, **kwargs: Any) -> Any:
        pairs.append((encoder.seen, plain(z).clone()))
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(type(decoder(watched.pipe)), "decode", noted)
    watched()
    seen, raw = pairs[-1]
    raw = raw.squeeze(2) if raw.ndim == 5 else raw
    expected = Latents(raw, watched.space, scaled=False).to_standard().tensor
    torch.testing.assert_close(seen.float(), expected.float(), rtol=1e-3, atol=1e-3)
    finals = [step for step in watched.guard.history if step.final]
    assert len(finals) == (2 if name in DECODES_OTHERWISE else 1)


@pytest.mark.parametrize("name", RUN)
def test_what_is_blocked_is_blank(name: str) -> None:
    watched = Watched(name, policy=policy(ALWAYS))
    for form in ("np", "latent"):
        blank, free = watched(output_type=form), bare(name, output_type=form)
        assert blank.shape == free.shape
        assert not np.asarray(blank).any()
        assert free.any()
        assert [verdict.decision for verdict in watched.guard.verdicts] == ["block"]
    late = Watched(name, policy=policy(ALWAYS, concept=FINAL_ONLY))
    assert not np.asarray(late()).any()


@pytest.mark.parametrize("name", RUN)
def test_steering_moves_what_the_pipeline_goes_on_with(name: str) -> None:
    if ignores_answers(every_class()[name]):
        with pytest.raises(GuardError, match="nothing can be steered in it, and policy 'test'"):
            Watched(name, policy=policy(ALWAYS, "steer"))
        return
    watched = Watched(name, policy=policy(ALWAYS, "steer"))
    watched()
    assert any(step.steering[0] is not None for step in watched.guard.history)
    steered = margins(watched)
    observed = Watched(name)
    observed()
    assert steered[0] == margins(observed)[0]
    assert all(a != b for a, b in zip(steered[1:], margins(observed)[1:], strict=False))


def margins(watched: Watched) -> list[float]:
    steps = [step.verdicts[0] for step in watched.guard.history]
    return [verdict.concepts[0].margin for verdict in steps if verdict is not None]


def test_tokens_of_patches_where_the_call_asks_for_them() -> None:
    """FIBO's pipelines pack single cells otherwise."""
    cls = every_class()["BriaFiboPipeline"]
    pipe = every_run.pipeline(cls)
    pipe.transformer._internal_dict = FrozenDict({**pipe.transformer.config, "in_channels": 192})
    run = functools.partial(every_run.arguments, cls, pipe, do_patching=True)
    free = pipe(**run()).images
    pipe.callback_on_step_end = guard_for(pipe)[0]
    assert same(free, pipe(**run()).images)
    pipe.callback_on_step_end = guard_for(pipe, policy=policy(ALWAYS))[0]
    assert not pipe(**run()).images.any()


def test_a_picture_in_tokens_of_another_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ideogram 4 has the latents of FLUX.2, and its own order of them in tokens."""
    photos = load_latents(EXAMPLES)
    named = dict(zip(photos.ids or (), photos.tensor.float(), strict=True))
    cls = every_class()["Ideogram4Pipeline"]
    decisions = {}
    for name in ("revolver", "cat"):
        pipe = every_run.pipeline(cls)
        target = tokens_by_cell(2).restored(named[name][None])

        def toward(
            *_: Any, hidden_states: Any, timestep: Any, target: Any = target, **__: Any
        ) -> Any:
            """The velocity that leads to a picture from wherever the loop is."""
            left = (1 - timestep.float()).view(-1, 1, 1).clamp_min(1e-6)
            velocity = torch.zeros_like(hidden_states)
            own = hidden_states[:, -target.shape[1] :]
            velocity[:, -target.shape[1] :] = (target - own) / left
            return (velocity,)

        for part in (pipe.transformer, pipe.unconditional_transformer):
            monkeypatch.setattr(part, "forward", toward)
        pipe.callback_on_step_end = guard = LatentGuard("family")
        given = every_run.arguments(cls, pipe, height=256, width=256, output_type="latent")
        made = pipe(**given).images
        decisions[name] = guard.verdicts[0].decision
        assert same(made, torch.zeros_like(made)) is (name == "revolver")
        assert name == "revolver" or torch.allclose(made, target, atol=1e-5)
    assert decisions == {"revolver": "block", "cat": "allow"}


def test_another_space_than_the_vaes_is_refused() -> None:
    """Both have 16 channels, packed alike."""
    pipe = every_run.pipeline(every_class()["QwenImagePipeline"])
    with pytest.raises(GuardError, match=r"given as flux1, but the VAE of this QwenImage.* wan21"):
        pipe.callback_on_step_end = LatentGuard(policy(), LinearEncoder("flux1", 16), space="flux1")


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("CogView4Pipeline", "sdxl", "of 4 channels, but the VAE .* has latents of 16 channels"),
        ("GlmImagePipeline", "flux1", "latents_mean and latents_std that are not those of flux1"),
    ],
)
def test_a_space_that_an_unknown_vae_denies_is_refused(name: str, space: str, message: str) -> None:
    pipe = every_run.pipeline(every_class()[name])
    encoder = LinearEncoder(space, LatentSpace.get(space).channels)
    with pytest.raises(GuardError, match=message):
        pipe.callback_on_step_end = LatentGuard(policy(), encoder, space=space)


@pytest.mark.parametrize("name", [name for name in SIMPLE if name in WITH_MODEL])
def test_the_bundled_model_is_found(name: str) -> None:
    cls = every_class()[name]
    pipe = every_run.pipeline(cls)
    pipe.callback_on_step_end = guard = LatentGuard("default")
    output = pipe(**every_run.arguments(cls, pipe))
    (verdict,) = output.latentguard.verdicts
    assert verdict.error is None
    assert verdict.model is not None
    assert verdict.model.name == best_encoder(guard._space_of(pipe).name)
