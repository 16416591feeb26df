"""`latentguard policy`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from latentguard.cli import policy as command
from latentguard.policy import json_schema, load_policy, shipped_policies

app = typer.Typer()
command.register(app)
app.command("other")(lambda: None)  # two commands, so that typer keeps `policy` as a name
runner = CliRunner()

BAD = """\
schema_version: 1
name: bad
version: 2
concepts:
  - id: a
    category: b
    prompts: []
    threshold: {probability: 2}
    action: block
"""


def test_list() -> None:
    result = runner.invoke(app, ["policy", "list"])
    assert result.exit_code == 0
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == sorted(shipped_policies())
    assert all(len(row) == 4 and row[3].endswith(".") for row in rows)


@pytest.mark.parametrize("name", ["default", "family", "i2p", "observe", "weapons"])
def test_show(name: str) -> None:
    result = runner.invoke(app, ["policy", "show", name])
    assert result.exit_code == 0
    policy = load_policy(name)
    assert policy.sha256 in result.stdout
    for concept in policy.concepts:
        assert concept.id in result.stdout


def test_show_json() -> None:
    result = runner.invoke(app, ["policy", "show", "default", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == load_policy("default").to_dict()


def test_show_does_not_read_markup(tmp_path: Path) -> None:
    path = tmp_path / "markup.yaml"
    text = BAD.replace("[]", "['[bold red]gun[/]']").replace("{probability: 2}", "{margin: 0}")
    path.write_text(text.replace("version: 2", "version: '[blink]'"))
    result = runner.invoke(app, ["policy", "show", str(path)])
    assert result.exit_code == 0
    assert "[bold red]gun[/]" in result.stdout
    assert "[blink]" in result.stdout


def test_check_prints_every_error_of_every_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(BAD)
    second.write_text("name: [\n")
    result = runner.invoke(app, ["policy", "check", str(first), "default", str(second), "nope"])
    assert result.exit_code == 2
    assert result.stdout.startswith("default: ok, 7 concepts, sha256 ")
    lines = result.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [f"{first}:{n}" for n in (3, 7, 8)]
    assert lines[3].startswith(f"{second}:2: this is not valid YAML")
    assert lines[4].startswith("no policy is named 'nope'")


def test_check_of_good_files() -> None:
    result = runner.invoke(app, ["policy", "check", *map(str, shipped_policies().values())])
    assert result.exit_code == 0
    assert result.stderr == ""


def test_check_notes_a_rate_without_calibration(tmp_path: Path) -> None:
    path = tmp_path / "rate.yaml"
    text = BAD.replace("[]", "[gun]").replace("{probability: 2}", "{fpr: 0.01}")
    path.write_text(text.replace("version: 2", "version: '2'"))
    result = runner.invoke(app, ["policy", "check", str(path)])
    assert result.exit_code == 0
    assert "note: 'a' asks for a false-positive rate of 0.01" in result.stderr


MIXED = """\
schema_version: 1
name: shop
version: "1"
contrast: [furniture, a portrait of a person]
concepts:
  - id: blades
    category: weapons
    prompts:
      - hatchet
      - a kitchen knife
      - a sword
    threshold: {probability: 0.5}
    action: block
"""


def test_check_with_a_model_names_each_prompt_that_it_cannot_see(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text(MIXED)
    result = runner.invoke(app, ["policy", "check", str(path), "--model", "nano-flux2"])
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[:2] == [
        f"{path}:10: concepts[0].prompts[1] 'a kitchen knife' is not visible to nano-flux2: "
        "coverage 0.502, 0.62 is needed",
        f"{path}:11: concepts[0].prompts[2] 'a sword' is not visible to nano-flux2: "
        "coverage 0.579, 0.62 is needed",
    ]
    assert lines[2].startswith(f"{path}:4: contrast[1] 'a portrait of a person' is not visible")
    assert lines[2].endswith("; no image is compared with it")
    assert "cannot see 2 of 3 prompts" in lines[3]


def test_check_with_a_model_of_a_policy_that_marks(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text(MIXED.replace("contrast", "uncovered: warn\ncontrast"))
    result = runner.invoke(app, ["policy", "check", str(path), "--model", "nano-flux2"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{path}: ok, 1 concept")
    assert "'a sword' is not visible to nano-flux2" in result.stderr


@pytest.mark.parametrize("model", ["nano-flux2", "nano-sdxl"])
def test_shipped_policies_fit_the_bundled_models(model: str) -> None:
    names = ["default", "family", "observe", "weapons"]
    result = runner.invoke(app, ["policy", "check", *names, "--model", model])
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == names
    # What default looks for it sees, every prompt of it.
    default = [line for line in result.stderr.splitlines() if "default.yaml" in line]
    assert default
    assert all("contrast[" in line for line in default)


def test_a_policy_of_which_the_bundled_models_see_nothing_is_refused() -> None:
    result = runner.invoke(app, ["policy", "check", "i2p", "--model", "nano-sdxl"])
    assert result.exit_code == 2
    assert "cannot see 51 of 51 prompts" in result.stderr
    result = runner.invoke(app, ["policy", "check", "i2p", "--model", "nano-flux2"])
    assert result.exit_code == 2
    assert "is written for sdxl latents" in result.stderr


def test_schema() -> None:
    result = runner.invoke(app, ["policy", "schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json_schema()
    file = next(iter(shipped_policies().values())).parent / "policy.schema.json"
    assert result.stdout == file.read_text()


def test_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys, latentguard.cli.policy;"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'latentguard.policy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_show_tells_the_categories_of_a_taxonomy() -> None:
    shown = runner.invoke(app, ["policy", "show", "i2p", "--taxonomy", "mlcommons"])
    assert shown.exit_code == 0
    assert "mapped to the taxonomies azure 2024-09-01, mlcommons 1.0" in shown.output
    assert "Violent Crimes" in shown.output
    assert "in no category of mlcommons: harassment, shocking" in shown.output


def test_check_names_what_a_taxonomy_leaves_out(tmp_path: Path) -> None:
    command = ["policy", "check", "family", "--taxonomy", "openai", "--model", "nano-flux2"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0
    assert "family: note: in no category of openai: beer, wine, spirits" in result.stderr
    assert (
        "family: note: nano-flux2 cannot see openai 'sexual', so its score is null (nudity)"
    ) in result.stderr
    refused = runner.invoke(app, ["policy", "check", "default", "--taxonomy", "openai"])
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        "default: policy 'default' maps no concept to the taxonomy 'openai'; those that it maps "
        "to: azure, rekognition"
    ]


def test_check_names_a_space_and_a_model_that_nothing_knows(tmp_path: Path) -> None:
    path = tmp_path / "slips.yaml"
    path.write_text(
        "schema_version: 1\nname: slips\nversion: '1'\nspace: sdxll\nmodel: nano-flx\nconcepts:\n"
        "  - {id: a, category: b, prompts: [revolver], threshold: {margin: 0}, action: block}\n"
    )
    result = runner.invoke(app, ["policy", "check", str(path), "default"])
    assert result.exit_code == 0, result.output
    assert "note: space 'sdxll' is not known here (did you mean sdxl?)" in result.stderr
    assert "note: model 'nano-flx' is not known here" in result.stderr
    assert "default: note" not in result.stderr


def test_check_takes_a_space_by_its_file(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="models need torch")
    from latentguard.spaces import SPACES

    path = tmp_path / "own-four.yaml"
    rows = ", ".join(["[0.1, 0.2, 0.3]"] * 4)
    path.write_text(
        "schema_version: 1\nchannels: 4\nfactor: 8\nscaling: {scale: 0.5}\n"
        f"rgb_view: {{acts_on: scaled, factors: [{rows}]}}\n"
    )
    try:
        result = runner.invoke(
            app, ["policy", "check", "default", "--model", "nano-view", "--space", str(path)]
        )
    finally:
        SPACES.pop("own-four", None)
    assert result.exit_code == 0, result.output
