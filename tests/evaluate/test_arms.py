"""Arms on the exact generator and on a small Stable Diffusion pipeline, loaded from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="generators need torch")
diffusers = pytest.importorskip("diffusers", reason="the generators are pipelines of diffusers")

from latentguard.errors import ModelError, UsageError  # noqa: E402
from latentguard.evaluate.generate.arms import (  # noqa: E402
    Guarded,
    SafeLatentDiffusion,
    SearchedNoise,
    Unguarded,
    with_action,
)
from latentguard.evaluate.generate.asked import Asked  # noqa: E402
from latentguard.evaluate.generate.exact_generator import ExactGenerator  # noqa: E402
from latentguard.evaluate.generate.generators import PipelineGenerator  # noqa: E402
from latentguard.evaluate.generate.settings import Settings, read_settings  # noqa: E402
from latentguard.policy import load_policy  # noqa: E402

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"
REVOLVER = Asked("00000/0000", 0, 0, "a revolver", 3, 5.0)
PAGODA = Asked("00001/0000", 1, 0, "a pagoda", 3, 5.0)


@pytest.fixture(scope="module", params=["sdxl", pytest.param("flux2", marks=pytest.mark.slow)])
def exact(request):
    return ExactGenerator(LATENTS, loop=request.param, steps=6, leak=0.05)


def test_the_arms_on_the_exact_generator(exact):
    policy = load_policy("weapons")
    plain = Unguarded(exact).make(REVOLVER)
    assert (plain.blocked, plain.facts["became"]) == (False, "revolver")
    assert plain.steps == plain.steps_asked == 6

    block = Guarded(exact, policy, "block", "auto")
    blocked = block.make(REVOLVER)
    assert blocked.blocked
    assert "handguns" in blocked.reason
    assert blocked.latents is None
    assert not np.asarray(blocked.picture).any()
    assert blocked.steps < blocked.steps_asked
    # What the policy allows is the same as without a guard, picture and latents.
    kept, bare = block.make(PAGODA), Unguarded(exact).make(PAGODA)
    assert kept.picture.tobytes() == bare.picture.tobytes()
    assert torch.equal(kept.latents.tensor, bare.latents.tensor)

    steered = Guarded(exact, policy, "steer", "auto").make(REVOLVER)
    assert steered.facts["steered"]
    assert steered.blocked or steered.facts["became"] != "revolver"

    searched = SearchedNoise(exact, policy, "auto", iterations=1).make(REVOLVER)
    assert searched.facts["iterations"] == 1
    assert searched.facts["reward"] >= searched.facts["reward_before"]
    assert not searched.blocked


def test_every_concept_that_acts_does_what_the_arm_does():
    policy = load_policy("family")
    for action in ("block", "steer"):
        changed = with_action(policy, action)
        for before, after in zip(policy.concepts, changed.concepts, strict=True):
            acting = before.action in ("block", "steer")
            assert after.action == (action if acting else before.action)
    with pytest.raises(UsageError, match="no concept that blocks or steers"):
        with_action(load_policy("observe"), "block")


@pytest.fixture
def folder(small_pipeline):
    return small_pipeline


def test_a_pipeline_by_its_folder_with_settings_from_yaml_and_options(folder, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"pipeline: {folder}\nscheduler: EulerDiscreteScheduler\nsteps: 3\nguidance: 2\n"
        "scheduler_options: {timestep_spacing: trailing}\ndevice: cpu\n"
    )
    generator = PipelineGenerator(read_settings(file, {"steps": 2, "guidance": None}))
    told = generator.describe()
    assert (told["scheduler"], told["steps"], told["guidance"]) == ("EulerDiscreteScheduler", 2, 2)
    assert told["scheduler_config"]["timestep_spacing"] == "trailing"
    asked = Asked("x", 0, 0, "a cat", 7, 7.5, 64, 64)
    assert generator.arguments(asked)["guidance_scale"] == 2
    first, again = (Unguarded(generator).make(asked) for _ in range(2))
    assert first.picture.size == (64, 64)
    assert first.picture.tobytes() == again.picture.tobytes()
    assert (first.steps, first.steps_asked) == (2, 2)
    assert (
        PipelineGenerator(Settings(str(folder), device="cpu")).describe()["weights_sha256"]
        == (told["weights_sha256"])
    )


def test_safe_latent_diffusion_where_diffusers_has_it(folder):
    if not hasattr(diffusers, "StableDiffusionPipelineSafe"):
        pytest.skip("the installed diffusers has no StableDiffusionPipelineSafe")
    generator = PipelineGenerator(Settings(str(folder), device="cpu", steps=12))
    asked = Asked("x", 0, 0, "a cat", 7, 7.5, 64, 64)
    arm = SafeLatentDiffusion(generator, "max")
    assert arm.describe()["sld_guidance_scale"] == 5000
    safe, plain = arm.make(asked), Unguarded(generator).make(asked)
    assert safe.picture.size == plain.picture.size
    assert safe.picture.tobytes() != plain.picture.tobytes()
    assert safe.steps is None  # its pipeline has no step callback


def test_what_cannot_be_run_says_so(folder, tmp_path, exact):
    with pytest.raises(UsageError, match="needs a StableDiffusionPipeline"):
        SafeLatentDiffusion(exact)
    with pytest.raises(ModelError, match="diffusers cannot load this pipeline"):
        PipelineGenerator(Settings(str(tmp_path)))
    with pytest.raises(UsageError, match="no scheduler 'Nobody'"):
        PipelineGenerator(Settings(str(folder), scheduler="Nobody"))
    with pytest.raises(UsageError, match="dtype must be one of"):
        Settings("x", dtype="int8")
    with pytest.raises(UsageError, match="steps must be a whole number"):
        Settings("x", steps=0)
    file = tmp_path / "settings.yaml"
    file.write_text("pipeline: x\nstep: 3\n")
    with pytest.raises(UsageError, match="no such setting 'step'"):
        read_settings(file, {})
