"""GenEval: its metadata, its folders, its rules on known boxes, and a run without weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="generators need torch")
pytest.importorskip("diffusers", reason="the generators are pipelines of diffusers")

from latentguard.errors import UsageError  # noqa: E402
from latentguard.evaluate.geneval import Detected, Wanted, check, read_prompts  # noqa: E402
from latentguard.evaluate.geneval.colors import color_of  # noqa: E402
from latentguard.evaluate.geneval.measure import Seen, measure_arm  # noqa: E402
from latentguard.evaluate.geneval.prompts import COLORS, parse  # noqa: E402
from latentguard.evaluate.geneval.rules import relations  # noqa: E402

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"

# Prompts of our own, in the benchmark's form; they name pictures of examples/latents.pt.
ONE = '{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}'
TWO = (
    '{"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "revolver", '
    '"count": 1}], "prompt": "a cat and a revolver"}'
)
COUNT = (
    '{"tag": "counting", "include": [{"class": "cup", "count": 2}], '
    '"exclude": [{"class": "cup", "count": 3}], "prompt": "two cups"}'
)
COLOR = (
    '{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], '
    '"prompt": "a red cup"}'
)
PLACE = (
    '{"tag": "position", "include": [{"class": "dog", "count": 1}, '
    '{"class": "cup", "count": 1, "position": ["left of", 0]}], "prompt": "a cup left of a dog"}'
)
BOTH = (
    '{"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}, '
    '{"class": "dog", "count": 1, "color": "white"}], "prompt": "a red cup and a white dog"}'
)


def at(x, y, score=0.95, size=100, color=None):
    """A square object around a center."""
    return Detected((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score, color)


def test_the_metadata_as_it_is_published(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join([ONE, COUNT, PLACE, ""]))
    (one, count, place), sha256 = read_prompts(file)
    assert (one.tag, one.text, one.include) == ("single_object", "a cat", (Wanted("cat", 1),))
    assert count.exclude == (Wanted("cup", 3),)
    assert place.include[1] == Wanted("cup", 1, None, ("left of", 0))
    assert place.line == PLACE
    assert len(sha256) == 64


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no line of GenEval's metadata"),
        (ONE.replace("single_object", "objects"), "the tag must be one of single_object"),
        (ONE.replace('"include"', '"included"'), "there is no 'include'"),
        (ONE.replace('"count": 1', '"count": 0'), "a count must be 1 to 100, got 0"),
        (COLOR.replace('"red"', '"mauve"'), "a color must be one of red"),
        (PLACE.replace("left of", "near"), "a relation must be one of left of"),
        (PLACE.replace('"left of", 0', '"left of", 1'), "to an object before its own, got 1"),
    ],
)
def test_metadata_that_is_wrong_says_where(tmp_path, line, said):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text(f"{ONE}\n{line}\n")
    with pytest.raises(UsageError, match=f"line 2: .*{said}"):
        read_prompts(file)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["tag", "include", "exclude", "prompt", "class", "count", "position"]
                ),
                x,
            )
        ),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_json_is_a_prompt_or_an_error(value):
    with pytest.raises(UsageError, match=r"^here: is no line"):
        parse(json.dumps(value), "here")


RULES = [
    (ONE, {"cat": [at(0, 0, 0.31)]}, None),
    (ONE, {"cat": [at(0, 0, 0.3)]}, "expected 1 of cat, found 0"),  # above, not at
    (ONE, {"dog": [at(0, 0)]}, "expected 1 of cat, found 0"),
    (TWO, {"cat": [at(0, 0)], "revolver": [at(300, 0)]}, None),
    (TWO, {"cat": [at(0, 0)]}, "expected 1 of revolver, found 0"),
    (COUNT, {"cup": [at(0, 0), at(200, 0)]}, None),
    (COUNT, {"cup": [at(0, 0)]}, "expected 2 of cup, found 1"),
    (COUNT, {"cup": [at(200 * i, 0) for i in range(3)]}, "fewer than 3 of cup, found 3"),
    # What is less sure than 0.9 is not counted.
    (COUNT, {"cup": [at(0, 0), at(200, 0), at(400, 0, 0.9)]}, None),
    (COLOR, {"cup": [at(0, 0, color="red")]}, None),
    (COLOR, {"cup": [at(0, 0, color="blue")]}, "expected red cup, found blue"),
    # The surest one counts.
    (COLOR, {"cup": [at(0, 0, 0.5, color="red"), at(9, 0, 0.6, color="blue")]}, "found blue"),
    (PLACE, {"dog": [at(300, 0)], "cup": [at(0, 0)]}, None),
    (PLACE, {"dog": [at(0, 0)], "cup": [at(300, 0)]}, "left of its target, found it right of"),
    (PLACE, {"dog": [at(0, 300)], "cup": [at(0, 0)]}, "found it above"),
    (PLACE, {"dog": [at(15, 0)], "cup": [at(0, 0)]}, "found it neither"),
    (PLACE, {"cup": [at(0, 0)]}, "nothing is there for cup to be left of"),
    (BOTH, {"cup": [at(0, 0, color="red")], "dog": [at(300, 0, color="white")]}, None),
    (BOTH, {"cup": [at(0, 0, color="white")], "dog": [at(300, 0, color="red")]}, "red cup"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "found", "said"), RULES)
def test_the_rules_on_known_boxes(line, found, said):
    wrong = check(parse(line, "here"), found)
    if said is None:
        assert wrong == []
    else:
        assert said in "; ".join(wrong)


def test_relations_are_each_others_opposites():
    assert relations(at(0, 0), at(0, 0)) == set()
    assert relations(at(0, 0), at(300, 300)) == {"left of", "above"}
    assert relations(at(300, 300), at(0, 0)) == {"right of", "below"}
    assert relations(at(0, 0), at(300, 40)) == {"left of"}


@pytest.mark.parametrize(
    ("name", "rgb"),
    [
        ("red", (200, 20, 20)), ("orange", (250, 140, 20)), ("yellow", (250, 225, 40)),
        ("green", (40, 140, 50)), ("blue", (30, 60, 200)), ("purple", (110, 40, 150)),
        ("pink", (250, 150, 190)), ("brown", (105, 65, 40)), ("black", (12, 12, 14)),
        ("white", (250, 250, 248)),
    ],
)  # fmt: skip
def test_colors_of_pixels(name, rgb):
    noise = np.random.default_rng(0).integers(-12, 13, (500, 3))
    pixels = (np.array(rgb) + noise).clip(0, 255).astype(np.uint8)
    assert color_of(pixels) == name
    assert name in COLORS
    assert color_of(pixels[:0]) is None


def test_the_figures_of_a_table_made_by_hand():
    prompts = [parse(line, "here") for line in (ONE, ONE, COUNT)]
    right = [(0, True), (0, False), (1, False), (1, False), (2, True), (2, True)]
    images = [Seen(row, False, hit) for row, hit in right]
    images[5] = Seen(2, True, True)  # a blocked image is not right
    found = measure_arm(prompts, images)
    assert found["by_tag"]["single_object"]["value"] == 0.25
    assert found["by_tag"]["counting"]["value"] == 0.5
    assert found["overall"]["value"] == 0.375  # the mean over tags, not 2 / 6
    assert found["prompts"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["blocked"]["value"] == pytest.approx(1 / 6, abs=1e-6)
    none = measure_arm(prompts, [Seen(0, False, None)])
    assert (none["overall"], none["by_tag"]) == (None, {})


def _arguments(tmp_path, run):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text(f"{ONE}\n{TWO}\n")
    return (
        "evaluate", "geneval", file, "--run", run, "--generator", "exact", "--latents", LATENTS,
        "--steps", 3, "--images", 2,
    )  # fmt: skip


def test_a_run_has_the_layout_that_the_official_evaluator_reads(command, tmp_path):
    run = tmp_path / "run"
    ran = command(
        *_arguments(tmp_path, run), "--evaluator", "none", "--arm", "none", "--arm", "block",
        "--policy", "weapons", "--format", "json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)
    assert results["evaluator"] is None
    # "revolver" is the longer of the two classes that the second prompt names.
    assert results["arms"]["block"]["blocked"]["value"] == 0.5
    for number, line in enumerate((ONE, TWO)):
        folder = run / "images" / "none" / f"{number:05}"
        # As the evaluator reads it: folders by their digits, one JSON object, PNGs by their digits.
        assert folder.name.isdigit()
        assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(line)
        names = sorted(path.name for path in (folder / "samples").glob("*.png"))
        assert names == ["0000.png", "0001.png"]
        assert (folder / "grid.png").is_file()
    page = (run / "results.md").read_text("utf-8")
    assert "Nothing was evaluated here" in page
    assert "| Stable Diffusion XL | 0.55 | 0.98 |" in page


def test_without_weights_one_sentence_says_what_is_missing(command, tmp_path):
    run, nothing = tmp_path / "run", tmp_path / "nothing.pth"
    ran = command(*_arguments(tmp_path, run), "--detector", nothing)
    assert ran.code == 2
    assert "needs the weights of torchvision's maskrcnn_resnet50_fpn_v2" in ran.err
    assert "--evaluator none" in ran.err
    assert not run.exists()


@pytest.mark.slow
def test_the_built_in_evaluator_end_to_end_with_weights_of_its_form(command, tmp_path):
    """Random weights in a file of the published form: the mechanics, not what it sees."""
    detection = pytest.importorskip(
        "torchvision", reason="the detector is torchvision's"
    ).models.detection
    weights, run = tmp_path / "weights.pth", tmp_path / "run"
    model = detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    torch.save(model.state_dict(), weights)
    ran = command(
        *_arguments(tmp_path, run), "--detector", weights, "--limit", 1, "--format", "json"
    )
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["evaluator"] == "built-in, not the official one"
    lines = [json.loads(x) for x in (run / "evaluated" / "none.jsonl").read_text().splitlines()]
    assert [line["filename"] for line in lines] == [
        "images/none/00000/samples/0000.png", "images/none/00000/samples/0001.png",
    ]  # fmt: skip
    assert {"tag", "prompt", "correct", "reason", "metadata"} <= lines[0].keys()
    assert "not the official one" in (run / "results.md").read_text("utf-8")


def test_the_built_in_evaluator_on_a_real_photo():
    from latentguard.evaluate.geneval.detector import BuiltInEvaluator

    data = pytest.importorskip("skimage.data", reason="the photo is scikit-image's")
    file = Path(torch.hub.get_dir(), "checkpoints", "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth")
    if not file.is_file():
        pytest.skip("needs torchvision's weights of maskrcnn_resnet50_fpn_v2, which are a download")
    assert "cat" in BuiltInEvaluator(file).detect(data.chelsea())
