"""ReNO: rewards on latents and on pixels, the arm, and runs of the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="generators need torch")
pytest.importorskip("diffusers", reason="the generators are pipelines of diffusers")

import open_clip  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_clip import tiny_clip  # noqa: E402

from latentguard import Latents, optimize_noise  # noqa: E402
from latentguard.errors import LatentsError, ModelError, UsageError  # noqa: E402
from latentguard.evaluate.generate.arms import Guarded, SearchedNoise, Unguarded  # noqa: E402
from latentguard.evaluate.generate.asked import Asked  # noqa: E402
from latentguard.evaluate.generate.generators import PipelineGenerator  # noqa: E402
from latentguard.evaluate.generate.reno import Reno  # noqa: E402
from latentguard.evaluate.generate.rewards import arm_name, encoder_named  # noqa: E402
from latentguard.evaluate.generate.settings import Settings  # noqa: E402
from latentguard.evaluate.reno import read_prompts  # noqa: E402
from latentguard.evaluate.reno.measure import measure_arm, saved  # noqa: E402
from latentguard.policy import load_policy  # noqa: E402

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"
LATENT = "latent:nano-view"
CAT = Asked("00000/0000", 0, 0, "a cat", 7, 0.0, 64, 64)


@pytest.fixture(scope="module")
def pixel(tmp_path_factory):
    """The name of a reward on pixels."""
    return "pixel:{}:{}".format(*tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def generator(small_pipeline):
    return PipelineGenerator(Settings(str(small_pipeline), device="cpu", steps=1))


def clean(generator, asked=CAT):
    """The latents that the pipeline makes, and its picture of them."""
    arguments = generator.arguments(asked)
    noise = {"generator": torch.Generator().manual_seed(asked.seed)}
    latents = generator.pipe(**arguments, **noise, output_type="latent").images
    noise = {"generator": torch.Generator().manual_seed(asked.seed)}
    return Latents(latents, "sd1", True), generator.pipe(**arguments, **noise).images[0]


def test_the_decoder_shows_what_the_pipeline_shows(generator):
    latents, picture = clean(generator)
    pixels = generator.decode(latents)[0].detach().permute(1, 2, 0).numpy()
    assert np.abs(pixels * 255 - np.asarray(picture, np.float32)).max() < 1


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (40, 56)])
def test_pixels_are_prepared_as_clip_has_it(generator, pixel, size):
    encoder = encoder_named(pixel, generator)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), np.uint8), "RGB")
    picture = coarse.resize(size, Image.Resampling.BICUBIC)
    official = open_clip.image_transform(32, is_train=False)(picture)
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    # Pillow rounds to whole numbers: 1/255, over the smallest standard deviation, 0.26.
    assert (encoder.prepared(tensor)[0] - official).abs().max() < 2 / 255 / 0.26


def test_the_gradient_of_a_reward_on_pixels_is_its_slope(generator, pixel):
    encoder = encoder_named(pixel, generator)
    text = encoder.encode_text(["a cat"])[0]
    latents, _ = clean(generator)
    x = latents.tensor.detach().clone().requires_grad_(True)

    def reward(tensor):
        return 100 * (encoder.encode_latents(Latents(tensor, "sd1", True))[0] @ text)

    (gradient,) = torch.autograd.grad(reward(x), x)
    along = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        slope = (reward(x + step * along) - reward(x - step * along)) / (2 * step)
    # Single precision leaves about 1e-3 of such a difference.
    torch.testing.assert_close(slope, gradient.norm(), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_the_search_raises_its_reward_and_begins_with_the_pipelines_own_image(
    generator, pixel, kind
):
    encoders = {name: encoder_named(name, generator) for name in (LATENT, pixel)}
    reward = LATENT if kind == "latent" else pixel
    plain = Unguarded(generator).make(CAT)
    bare = Reno(generator, reward, encoders, 0).make(CAT)
    assert bare.picture.tobytes() == plain.picture.tobytes()
    made = Reno(generator, reward, encoders, 8).make(CAT)
    similarity = made.facts["similarity"]
    assert len(similarity) == 9
    assert max(similarity) > similarity[0]
    before, after = made.facts["measured"][reward]
    assert before == pytest.approx(similarity[0], abs=1e-5)
    assert after == pytest.approx(max(similarity), abs=1e-4)
    assert set(made.facts["measured"]) == {LATENT, pixel}
    assert made.picture.tobytes() != plain.picture.tobytes()


def test_a_policy_is_a_negative_reward_on_pixels_too(generator, pixel):
    """I2P's arm with a CLIP on pixels: the same search, with another encoder."""
    arm = SearchedNoise(generator, load_policy("weapons"), pixel, iterations=2)
    assert arm.describe()["model"]["name"] == pixel
    made = arm.make(CAT)
    assert made.facts["reward"] >= made.facts["reward_before"]
    with pytest.raises(UsageError, match="the arm block needs a model of latents"):
        Guarded(generator, load_policy("weapons"), "block", pixel)


def test_without_a_policy_there_is_a_reward_and_there_are_no_verdicts(generator):
    arguments = generator.arguments(CAT)
    calls = []

    def reward(latents):
        calls.append(latents)
        return 0 * latents.tensor.flatten(1).sum(1)

    found = optimize_noise(generator.pipe, policy=None, reward=reward, iterations=2, **arguments)
    assert found.verdicts == []
    assert len(calls) == 3  # a reward of one's own is never satisfied, not even by 0
    assert torch.equal(found.first.tensor, calls[0].tensor)
    assert not found.first.tensor.requires_grad
    with pytest.raises(LatentsError, match="nothing to search for: give a policy, a reward"):
        optimize_noise(generator.pipe, policy=None, **arguments)
    with pytest.raises(LatentsError, match="agreement is measured with the policy's model"):
        optimize_noise(generator.pipe, policy=None, agreement=1.0, **arguments)


def test_rewards_by_name(generator, tmp_path):
    assert arm_name("latent:latent-clip-b8") == "reno-latent-latent-clip-b8"
    assert arm_name("pixel:ViT-B-16:openai") == "reno-pixel-ViT-B-16-openai"
    assert arm_name("pixel:ViT-B-16:../weights/own one.pt") == "reno-pixel-ViT-B-16-own-one"
    for wrong in ("nano-view", "latent:", "pixel:ViT-B-16", "pixel::openai"):
        with pytest.raises(UsageError, match="a reward must be latent:MODEL or pixel:"):
            encoder_named(wrong, generator)
    for wrong in ("pixel:ViT-B-16:nothing", f"pixel:Nobody:{tmp_path}"):
        with pytest.raises(ModelError, match="needs weights that open_clip can load"):
            encoder_named(wrong, generator)


def record(row, similarity, seconds, measured):
    spent = {"search": seconds, "picture": 0.0}
    facts = {"similarity": similarity, "measured": measured, "seconds": spent}
    return {"row": row, "facts": facts}


def test_figures_of_known_records():
    ones = [
        record(0, [0.1, 0.3, 0.2], 8.0, {"a": [0.1, 0.3], "b": [0.5, 0.4]}),
        record(1, [0.2, 0.1, 0.6], 4.0, {"a": [0.2, 0.6], "b": [0.5, 0.4]}),
    ]
    found = measure_arm(ones, "a")
    assert [point["value"] for point in found["curve"]] == [0.15, 0.25, 0.45]
    assert [point["value"] for point in found["iterates"]] == [0.15, 0.2, 0.4]
    assert found["measured"]["a"]["gained"]["value"] == pytest.approx(0.3)
    assert found["measured"]["b"]["gained"] == {"value": -0.1, "interval": [-0.1, -0.1]}
    slower = [record(0, [0], 10.0, {}), record(1, [0], 8.0, {})]
    share = saved(ones, slower)
    assert share["value"] == pytest.approx((0.2 + 0.5) / 2)
    assert share["interval"] == pytest.approx([0.2, 0.5])


def test_prompts_of_each_kind_of_file(tmp_path):
    text, geneval = tmp_path / "prompts.txt", tmp_path / "evaluation_metadata.jsonl"
    text.write_text("a cat\tseen\n\na_pagoda / by night\n")
    assert read_prompts(text)[0] == ["a cat", "a_pagoda / by night"]
    line = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
    geneval.write_text(json.dumps(line))
    assert read_prompts(geneval)[0] == ["two cats"]
    for wrong, said in ((b"\n\n", "has no prompts"), (b"\xff", "is not UTF-8")):
        text.write_bytes(wrong)
        with pytest.raises(UsageError, match=said):
            read_prompts(text)


EXACT = ("--generator", "exact", "--latents", LATENTS, "--steps", 1)


def test_a_run_times_both_rewards_and_goes_on_to_the_same_figures(command, tmp_path, pixel):
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a revolver\na pagoda\n")
    options = (
        "evaluate", "reno", prompts, *EXACT, "--leak", 0.3, "--iterations", 1,
        "--reward", "latent:nano-flux2", "--reward", pixel,
    )  # fmt: skip
    ran = command(*options, "--run", run, "--format", "json")
    assert ran.code == 0, ran.err
    arms = json.loads(ran.out)["arms"]
    assert list(arms) == ["reno-latent-nano-flux2", arm_name(pixel)]
    for one in arms.values():
        assert set(one["measured"]) == {"latent:nano-flux2", pixel}
        assert len(one["curve"]) == 2
    cost = json.loads((run / "cost.json").read_text())
    assert set(cost["saved"]) == {f"reno-latent-nano-flux2 against {arm_name(pixel)}"}
    assert "| SDXL-Turbo, CLIP on pixels, 50 iterations | 11.59 |" in (run / "cost.md").read_text()

    names = ("results.json", "results.md", "results.png")
    before = [(run / name).read_bytes() for name in names]
    (run / "records" / "reno-latent-nano-flux2" / "00001" / "0000.json").unlink()
    for name in names:
        (run / name).unlink()
    assert command(*options, "--run", run, "--resume").code == 0
    assert [(run / name).read_bytes() for name in names] == before


def test_the_other_benchmarks_have_the_arm(command, tmp_path):
    file, run = tmp_path / "color_val.txt", tmp_path / "run"
    file.write_text("a revolver\n")
    ran = command(
        "evaluate", "t2i-compbench", file, "--run", run, *EXACT, "--images", 1, "--arm", "none",
        "--arm", "reno", "--reward", "latent:nano-flux2", "--iterations", 1,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for arm in ("none", "reno-latent-nano-flux2"):
        assert (run / "images" / arm / "samples" / "a revolver_000000.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "the arm reno needs --reward"),
        (("--arm", "none", "--reward", LATENT), "evaluate reno has only the arm reno"),
        (
            ("--reward", "latent:a/model.pt", "--reward", "latent:b/model.pt"),
            "would share the folder reno-latent-model",
        ),
        (("--reward", "model"), "a reward must be latent:MODEL or pixel:"),
    ],
)
def test_options_that_do_not_go_together(command, tmp_path, options, said):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a revolver\n")
    ran = command("evaluate", "reno", prompts, "--run", tmp_path / "run", *EXACT, *options)
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "run").exists()
