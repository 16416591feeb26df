"""T2I-CompBench: its prompt files, and the folder that its own evaluators read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="generators need torch")
pytest.importorskip("diffusers", reason="the generators are pipelines of diffusers")

from latentguard.errors import UsageError
from latentguard.evaluate.t2i_compbench import asked_of, read_prompts

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"


def test_prompts_stand_before_a_tab(tmp_path):
    file = tmp_path / "color_val.txt"
    file.write_text("a cat and a cup.\tseen\n\na pagoda\n")
    prompts, _ = read_prompts(file)
    assert prompts == ["a cat and a cup.", "a pagoda"]
    asked = asked_of(prompts, 2)
    assert [one.file for one in asked] == [
        "samples/a cat and a cup._000000", "samples/a cat and a cup._000001",
        "samples/a pagoda_000002", "samples/a pagoda_000003",
    ]  # fmt: skip
    assert [one.seed for one in asked] == [42, 43, 42, 43]


@pytest.mark.parametrize("prompt", ["../cat", "a_cat", ".cat", "a\\cat", "a \u202ecat"])
def test_a_prompt_that_cannot_be_a_name_is_refused(tmp_path, prompt):
    file = tmp_path / "color_val.txt"
    file.write_text(f"a cat\n{prompt}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="line 2: T2I-CompBench reads prompts from the names"):
        read_prompts(file)


def test_a_run_has_the_folder_that_the_evaluators_read(command, tmp_path):
    file, run = tmp_path / "color_val.txt", tmp_path / "run"
    file.write_text("a cat\na revolver\n")
    ran = command(
        "evaluate", "t2i-compbench", file, "--run", run, "--generator", "exact", "--latents",
        LATENTS, "--steps", 3, "--images", 2, "--arm", "block", "--policy", "weapons",
        "--format", "json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["arms"]["block"]["blocked"]["value"] == 0.5
    # As BLIP-VQA's script reads them: all files of the folder, the prompt and the number by "_".
    names = [path.name for path in (run / "images" / "block" / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == ["a cat"] * 2 + ["a revolver"] * 2
