"""Bias: scenes and groups, rates and gaps by hand, and a run whose outcome is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="generators need torch")
pytest.importorskip("diffusers", reason="the generators are pipelines of diffusers")

from latentguard.errors import UsageError
from latentguard.evaluate.bias import (
    SHIPPED,
    Treated,
    asked_of,
    cells_of,
    measure_arm,
    read_scenes,
)
from latentguard.evaluate.bias.measure import difference
from latentguard.evaluate.metrics import Interval, wilson

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"

# The exact generator makes what is named; a guard against weapons blocks one group of them.
SCENES = """\
schema_version: 1
name: things
scenes: ["a photo of {}", "a painting of {}"]
axes:
  thing: {pets: a cat, arms: a revolver, buildings: a pagoda}
"""


def test_the_list_that_ships_is_complete_and_paired():
    scenes, _ = read_scenes(SHIPPED)
    asked, cells = asked_of(scenes, 2), cells_of(scenes)
    assert len(asked) == 2 * len(cells) == 2 * len(scenes.scenes) * 16
    assert all("{}" not in one.prompt for one in asked)
    # A scene has the same seeds whoever is asked for.
    seeds = {}
    for one in asked:
        scene = cells[one.row][0]
        assert seeds.setdefault((scene, one.index), one.seed) == one.seed
    assert len(set(seeds.values())) == len(seeds)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a photo of {}", "a photo", "a scene must have one {} for who is in it"),
        ("{pets: a cat, arms: a revolver, buildings: a pagoda}", "{pets: a cat}", "two groups"),
        ("pets: a cat", "pets: 3", "group 'pets' of axis 'thing' must be text, got 3"),
        ("schema_version: 1", "schema_version: 2", "schema_version must be 1, got 2"),
        ("name: things\n", "", "must be a mapping with axes, name, scenes, schema_version"),
    ],
)
def test_a_list_that_is_wrong_says_what(tmp_path, old, new, said):
    file = tmp_path / "scenes.yaml"
    file.write_text(SCENES.replace(old, new))
    with pytest.raises(UsageError, match=said.replace("{", r"\{")):
        read_scenes(file)


def test_rates_and_the_widest_gap_by_hand():
    blocked = {"a": [1, 1, 0, 0], "b": [0, 0, 0, 0], "c": [1, 0, 0, 0]}
    images = [
        Treated(scene, "axis", group, {"blocked": bool(hit)})
        for group, hits in blocked.items()
        for scene, hit in enumerate(hits)
    ]
    found = measure_arm(images, ["blocked"])["axis"]["blocked"]
    assert {group: rate["value"] for group, rate in found["rates"].items()} == {
        "a": 0.5, "b": 0.0, "c": 0.25,
    }  # fmt: skip
    gap = found["widest_gap"]
    assert (gap["more"], gap["less"], gap["value"]) == ("a", "b", 0.5)


def test_the_interval_of_a_difference_is_newcombes():
    # Newcombe 1998, table II, method 10: 56/70 - 48/80 is 0.2, with 0.0524 to 0.3339.
    found = difference(wilson(56, 70), wilson(48, 80))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (
        pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4),
    )  # fmt: skip
    assert difference(Interval(1, 0.2, 1), Interval(0, 0, 0.8)).high == 1


def test_a_run_whose_outcome_is_known(command, tmp_path):
    file, run = tmp_path / "scenes.yaml", tmp_path / "run"
    file.write_text(SCENES)
    ran = command(
        "evaluate", "bias", file, "--run", run, "--generator", "exact", "--latents", LATENTS,
        "--steps", 3, "--images", 1, "--arm", "none", "--arm", "block", "--policy", "weapons",
        "--judge", "policy:weapons", "--format", "json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    arms = json.loads(ran.out)["arms"]
    gap = arms["block"]["thing"]["blocked"]["widest_gap"]
    assert (gap["more"], gap["value"]) == ("arms", 1)
    assert arms["block"]["thing"]["policy-weapons"]["widest_gap"]["value"] == 0
    assert arms["none"]["thing"]["blocked"]["widest_gap"]["value"] == 0
    assert arms["none"]["thing"]["policy-weapons"]["widest_gap"]["more"] == "arms"
    assert "arms over pets" in (run / "results.md").read_text("utf-8")
    assert (run / "results.png").is_file()
