"""Files of class names and of templates: the forms that people have, and what is wrong in them."""

from __future__ import annotations

import inspect
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentguard.errors import ModelError
from latentguard.evaluate.classes import read_classes, read_names
from latentguard.evaluate.templates import read_templates

MAPPING = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n"


def _write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_one_name_a_line(tmp_path):
    file = _write(tmp_path / "names.txt", "tench\ngreat white shark\n")
    found = read_classes(file)
    assert (found.names, found.synsets) == (("tench", "great white shark"), None)
    assert found.named("Great_White_Shark") == [1]
    assert found.named("shark") == []
    file.write_text("tench\nshark\n", encoding="utf-8-sig")  # as some editors save it
    assert read_names(file) == ["tench", "shark"]


def test_synsets_and_names_as_kaggle_has_them(tmp_path):
    found = read_classes(_write(tmp_path / "LOC_synset_mapping.txt", MAPPING))
    assert found.names == ("tench", "crane", "crane")
    assert found.by_synset["n03126707"] == 2
    assert found.named("tench, Tinca tinca") == found.named("tench") == [0]
    assert found.named("crane") == [1, 2]
    tabs = _write(tmp_path / "words.txt", MAPPING.replace(" ", "\t", 1))
    assert read_classes(tabs).names[0] == "tench"


def test_json_as_keras_has_it_and_plain(tmp_path):
    file = tmp_path / "imagenet_class_index.json"
    # Keys are in no order that counts.
    file.write_text('{"1": ["n01484850", "great_white_shark"], "0": ["n01440764", "tench"]}')
    found = read_classes(file)
    assert (found.names, found.synsets) == (
        ("tench", "great white shark"), ("n01440764", "n01484850"),
    )  # fmt: skip
    for plain in (["tench", "great_white_shark"], {"0": "tench", "1": "great white shark"}):
        file.write_text(json.dumps(plain))
        assert read_classes(file).names == found.names


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "tench\n\n", "a.txt, line 2: a class name must not be empty"),
        ("a.txt", "n01440764 tench\nshark\n", "a.txt, line 2: must be a synset and its name"),
        ("a.txt", "n01440764\n", "a.txt, line 1: must be a synset and its name"),
        ("a.txt", MAPPING + "n02012849 heron\n",
         "a.txt, line 4: the synset n02012849 stands in line 2, too"),
        ("a.txt", "", r"a.txt: must have 1 to \d+ lines, got 0"),
        ("a.json", '{"0": "tench", "2": "shark"}', 'numbered from 0 on, and "1" is missing'),
        ("a.json", '[["n1", "tench"]]', 'a.json, class "0": must be a synset and a name'),
        ("a.json", '[["n01440764", "a"], 3]', 'a.json, class "1": must be .*, got 3'),
        ("a.json", "[]", "must be an object or a list of 1 to"),
        ("a.json", "[" * 100_000, "a.json: is not JSON"),
    ],
)  # fmt: skip
def test_a_file_of_names_that_is_wrong_says_where(tmp_path, name, text, said):
    with pytest.raises(ModelError, match=said):
        read_classes(_write(tmp_path / name, text))


def test_what_is_no_text_is_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    for name in ("a.txt", "none.txt"):
        with pytest.raises(ModelError, match="cannot be read as text"):
            read_classes(tmp_path / name)


def test_the_synsets_of_another_file(tmp_path):
    names = read_classes(_write(tmp_path / "names.txt", "tench\ncrane bird\nconstruction crane\n"))
    mapping = read_classes(_write(tmp_path / "map.txt", MAPPING))
    both = names.with_synsets(mapping)
    assert (both.names[1], both.by_synset["n02012849"]) == ("crane bird", 1)
    with pytest.raises(ModelError, match="names no synsets"):
        mapping.with_synsets(names)
    with pytest.raises(ModelError, match=r"has 3 classes, and .* has 1"):
        read_classes(_write(tmp_path / "one.txt", "tench\n")).with_synsets(mapping)


def test_templates_as_people_have_them(tmp_path):
    file = _write(
        tmp_path / "templates.txt",
        "# CLIP's\n\na bad photo of a {}.\na {c} in a video game.\n",
    )
    assert read_templates(file) == ("a bad photo of a {}.", "a {} in a video game.")
    as_python = _write(
        tmp_path / "zero_shot_metadata.py",
        "OPENAI_IMAGENET_TEMPLATES = (\n    lambda c: f'a bad photo of a {c}.',\n"
        "    f\"the plastic {c}.\",\n    'itap of my {}.',\n)\n",
    )
    assert read_templates(as_python) == (
        "a bad photo of a {}.", "the plastic {}.", "itap of my {}.",
    )  # fmt: skip


def test_the_list_of_clip_as_open_clip_writes_it(tmp_path):
    zero_shot = pytest.importorskip("open_clip.zero_shot_metadata", reason="has CLIP's templates")
    source = inspect.getsource(zero_shot)
    cut = source[source.index("OPENAI_IMAGENET_TEMPLATES") :]
    file = _write(tmp_path / "templates.txt", cut[: cut.index("\n)") + 2] + "\n")
    every = [template("{}") for template in zero_shot.OPENAI_IMAGENET_TEMPLATES]
    assert len(every) == 80
    assert list(read_templates(file)) == every
    assert list(read_templates(_write(file, "\n".join(every)))) == every


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {}\na photo\n", r"line 2: a template must have one \{\} .*, got 'a photo'"),
        ("a {} and a {c}\n", "line 1: a template must have one"),
        ("a {{}}\n", "line 1: a template must have one"),
        ("# nothing\n\n", "has no template"),
    ],
)
def test_a_template_that_is_wrong_says_where(tmp_path, text, said):
    with pytest.raises(ModelError, match=said):
        read_templates(_write(tmp_path / "templates.txt", text))


LINES = st.lists(
    st.sampled_from(["n01440764 tench", "crane", "{}", "{c}", "f'{c}'", "[", "]", "{", '"0":'])
    | st.text(max_size=6),
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES)
def test_any_text_is_names_and_templates_or_an_error(tmp_path, lines):
    for name, read in (
        ("a.txt", read_classes),
        ("a.json", read_classes),
        ("b.txt", read_templates),
    ):
        try:
            found = read(_write(tmp_path / name, "\n".join(lines)))
        except ModelError:
            continue
        if read is read_templates:
            assert all(one.count("{}") == 1 for one in found)
        else:
            assert all(found.names)
            assert found.synsets is None or len(found.synsets) == len(found)
