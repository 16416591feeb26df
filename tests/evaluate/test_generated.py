"""A generated ImageNet, small: what is asked for, figures by hand, runs whose outcome is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="generators need torch")
pytest.importorskip("diffusers", reason="the generators are pipelines of diffusers")

from latentguard.errors import UsageError  # noqa: E402
from latentguard.evaluate.generate.arms import Unguarded  # noqa: E402
from latentguard.evaluate.generate.exact_generator import ExactGenerator  # noqa: E402
from latentguard.evaluate.generate.folder import RunFolder  # noqa: E402
from latentguard.evaluate.generate.generators import PipelineGenerator  # noqa: E402
from latentguard.evaluate.generate.run import make_images, manifest_of  # noqa: E402
from latentguard.evaluate.generate.settings import Settings  # noqa: E402
from latentguard.evaluate.generate.shares import share  # noqa: E402
from latentguard.evaluate.generated import Measured, asked_of  # noqa: E402
from latentguard.evaluate.generated.measure import figures_of  # noqa: E402
from latentguard.evaluate.metrics import wilson  # noqa: E402
from latentguard.files import load_latents  # noqa: E402

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"
NAMES = ("wine bottle", "slot machine", "revolver", "umbrella", "syringe")


def test_each_image_of_each_class_has_a_seed_of_its_own():
    asked = asked_of(["tench", "goldfish"], 2, 5, "a {c}.")
    assert [(one.prompt, one.seed, one.file) for one in asked] == [
        ("a tench.", 5, "00000/0000"), ("a tench.", 6, "00000/0001"),
        ("a goldfish.", 7, "00001/0000"), ("a goldfish.", 8, "00001/0001"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"--prompt-template must have one \{\}"):
        asked_of(["tench"], 1, 0, "a photo")


def test_the_figures_of_a_table_made_by_hand():
    classes, ranks = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 3, 0, 0, -1, 6])
    predicted = np.array([0, 1, 1, 1, -1, 0])
    measured = Measured("model", "c" * 64, classes, ranks, predicted)
    found = figures_of(measured, ["a", "b", "c"])
    assert found["top1"]["value"] == 0.5
    assert found["top5"]["value"] == pytest.approx(4 / 6, abs=1e-6)  # a blocked one is not right
    assert [one["top1"] for one in found["by_class"]] == [0.5, 1, 0]
    assert found["by_class"][0]["taken_for"] == [{"class": 1, "name": "b", "images": 1}]
    assert found["by_class"][2]["taken_for"] == [{"class": 0, "name": "a", "images": 1}]
    alike = share(measured.right(1), classes.tolist())
    assert found["top1"]["interval"] == [round(alike.low, 6), round(alike.high, 6)]
    single = figures_of(
        Measured("m", "c", classes[::2], ranks[::2], predicted[::2]), ["a", "b", "c"]
    )
    assert single["top1"]["interval"][0] == round(wilson(2, 3).low, 6)


class CrashError(Exception):
    """As a crash between two images."""


def _arguments(names, run):
    return (
        "evaluate", "zeroshot", "--generate", "exact", "--latents", LATENTS, "--names", names,
        "--run", run, "--steps", 2, "--images", 2, "--limit", 3, "--arm", "none", "--arm", "block",
        "--policy", "weapons",
    )  # fmt: skip


def test_a_run_whose_outcome_is_known_and_the_same_after_an_interruption(command, tmp_path):
    names, whole, resumed = tmp_path / "names.txt", tmp_path / "whole", tmp_path / "resumed"
    names.write_text("".join(f"{name}\n" for name in NAMES))
    ran = command(*_arguments(names, whole), "--format", "json")
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)
    assert results == json.loads((whole / "results.json").read_text("utf-8"))
    assert (results["classes"], results["classes_generated"]) == (5, 3)
    none, block = results["arms"]["none"], results["arms"]["block"]
    # The generator makes what is asked for, and nano knows these.
    assert none["models"][0]["top1"]["value"] == 1
    assert none["models"][0]["top1"]["interval"][0] == round(wilson(3, 3).low, 6)
    assert none["blocked"]["value"] == 0
    assert block["blocked"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert block["models"][0]["top1"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert block["models"][0]["by_class"][2] == {
        "class": 2, "name": "revolver", "top1": 0.0, "taken_for": [],
    }  # fmt: skip
    page = (whole / "results.md").read_text("utf-8")
    assert "| **none, nano-flux2** | 1.000" in page
    assert "| SDXL-Turbo, Latent-CLIP B/4-plus | 0.846 |" in page
    assert json.loads((whole / "cost.json").read_text("utf-8"))["arms"]["none"]["images"] == 6

    generator = ExactGenerator(LATENTS, steps=2)
    manifest = json.loads((whole / "manifest.json").read_text("utf-8"))
    asked = asked_of(NAMES[:3], 2)
    folder = RunFolder(resumed, manifest_of("generated", manifest["prompts"], asked, generator))

    def crash(done, total):
        if done == 3:
            raise CrashError

    with pytest.raises(CrashError):
        make_images(folder, [Unguarded(generator)], asked, crash)
    before = {path: path.stat().st_mtime_ns for path in (resumed / "images").rglob("*.png")}
    assert len(before) == 3
    assert command(*_arguments(names, resumed)).code == 2  # needs --resume
    assert command(*_arguments(names, resumed), "--resume").code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in ("manifest.json", "results.json", "results.md", "results.png"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name

    # Another measurement of the same latents makes nothing again; other images are another run.
    again = command(
        *_arguments(names, whole), "--resume", "--template", "a {}", "--encoder", "auto"
    )
    assert again.code == 0, again.err
    ran = command(*_arguments(names, whole), "--resume", "--prompt-template", "one {}")
    assert "prompts.prompt_template was" in ran.err


def test_final_latents_of_a_pipeline(command, small_pipeline, tmp_path):
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    run, settings = tmp_path / "run", tmp_path / "sd.yaml"
    settings.write_text(f"pipeline: {small_pipeline}\nsteps: 2\nheight: 64\nwidth: 64\n")
    ran = command(
        "evaluate", "zeroshot", f"--generate={settings}", "--names", tmp_path / "names.txt",
        "--run", run, "--images", 1, "--device", "cpu", "--format", "json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    latents = load_latents(run / "latents" / "none" / "00000" / "0000.safetensors")
    assert (latents.space.name, latents.scaled, list(latents.tensor.shape)) == (
        "sd1", True, [1, 4, 8, 8],
    )  # fmt: skip
    # The pipeline decodes just these.
    generator = PipelineGenerator(Settings(str(small_pipeline), device="cpu", steps=2))
    asked = asked_of(["tench"], 1)[0]
    made = generator.pipe(
        **generator.arguments(asked) | {"height": 64, "width": 64},
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="pt",
    ).images
    with torch.no_grad():
        decoded = generator.pipe.vae.decode(latents.tensor / 0.18215).sample
    torch.testing.assert_close(made, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_what_cannot_be_generated_says_so(command, tmp_path):
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    common = ("--names", tmp_path / "names.txt", "--run", tmp_path / "run")
    for given, said in (
        (("--generate",), "--generate needs a pipeline"),
        (("--generate", "exact", "--arm", "sld"), "the arm sld returns only pictures"),
        (("--generate", "exact"), "--generator exact needs --latents"),
        (("--generate", tmp_path / "none.yaml"), "none.yaml: there is no such file"),
        (("--generate", "exact", "--latents", LATENTS, "--encoder", "nano-sdxl"),
         "reads sdxl latents, and the generator makes latents of flux2"),
        (("--generate", "exact", "--latents", LATENTS, "--steps", 2),
         "this one names no class of its set: 'a photo of a tench.'"),
    ):  # fmt: skip
        ran = command("evaluate", "zeroshot", *given, *common)
        assert ran.code == 2
        assert said in ran.err
