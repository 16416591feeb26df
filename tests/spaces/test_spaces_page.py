"""docs/spaces.md says what the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from typer.testing import CliRunner

from latentguard.cli import app, spaces
from latentguard.spaces import LatentSpace, records, table

PAGE = (Path(__file__).parents[2] / "docs" / "spaces.md").read_text(encoding="utf-8")

if not any(group.name == "spaces" for group in app.registered_groups):
    spaces.register(app)


def test_the_table_is_that_of_the_files() -> None:
    shown = re.search(r"<!-- latentguard spaces list .*?-->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert shown is not None
    assert shown.group(1) == table.markdown()


def test_every_key_of_a_file_is_on_the_page() -> None:
    for path in records.DATA.glob("*.json"):
        for key in json.loads(path.read_text(encoding="utf-8")):
            assert f"`{key}`" in PAGE, key


def test_the_example_is_a_space(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    values = yaml.safe_load(example.group(1))
    values["rgb_view"]["factors"] *= values["channels"]
    path = tmp_path / "my-space.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    space = LatentSpace.from_file(path)
    assert (space.name, space.scale, space.packed_channels) == ("my-space", 0.7, 64)


def test_the_commands(tmp_path: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["spaces", "list"], env={"COLUMNS": "200"})
    assert "sdxl-playground25" in listed.output
    shown = runner.invoke(app, ["spaces", "show", "wan2.1"])
    path = tmp_path / "wan-again.json"
    path.write_text(shown.output.replace('"wan21"', '"wan-again"'), encoding="utf-8")
    again = LatentSpace.from_file(path)
    assert (again.name, again.shift) == ("wan-again", LatentSpace.get("wan21").shift)
    assert runner.invoke(app, ["spaces", "show", str(path)]).exit_code == 0
