"""Files of concepts that were learned from examples: written, read, damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentguard.errors import ModelError, PolicyError
from latentguard.policy import Concept, Policy, Threshold, load_policy
from latentguard.policy.examples import (
    MAX_BYTES,
    Learned,
    load_concept,
    parse_concept,
    write_concept,
)

POLICY = """schema_version: 1
name: house
version: "1"
concepts:
  - id: logo
    category: brands
    examples: {file}
    threshold: {{probability: 0.5}}
    action: block
"""


def entry(model: str = "nano-flux2", space: str = "flux2", **changes: Any) -> Learned:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "model": model,
        "model_sha256": "ab" * 32,
        "space": space,
        "features": "trunk",
        "weight": rng.standard_normal(7).astype(np.float32),
        "bias": -0.25,
        "joint": rng.standard_normal(5).astype(np.float32),
        "positives": 20,
        "negatives": 100,
        "figures": {"auroc": [0.97, 0.93, 0.99]},
        "statistics": {"positives": rng.standard_normal((3, 3))},
    }
    return Learned(**(given | changes))


def edited(path: Path, **changes: Any) -> bytes:
    """The file with other values in its header's JSON; `None` takes one away."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["latentguard"])
    for key, value in changes.items():
        where = about if key in about else about["entries"][0]
        where[key] = value
        if value is None:
            del where[key]
    header["__metadata__"]["latentguard"] = json.dumps(about)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "logo.safetensors"
    write_concept(path, "our logo", [entry(), entry(space="sdxl", positives=5)])
    return path


def test_what_is_written_is_read_to_the_bit(file: Path, tmp_path: Path) -> None:
    found = load_concept(file)
    assert (found.name, found.label) == ("our logo", "examples of our logo")
    for one, other in zip(found.entries, [entry(), entry(space="sdxl", positives=5)], strict=True):
        assert np.array_equal(one.weight, other.weight)
        assert np.array_equal(one.joint, other.joint)
        assert np.array_equal(one.statistics["positives"], other.statistics["positives"])
        assert (one.bias, one.positives, one.figures) == (
            other.bias,
            other.positives,
            other.figures,
        )
    again = tmp_path / "again.safetensors"
    assert write_concept(again, found.name, found.entries).sha256 == found.sha256
    assert again.read_bytes() == file.read_bytes()


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9),
    st.floats(-1e3, 1e3),
    st.data(),
)
def test_no_image_has_a_margin_beyond_the_reach(
    weight: list[float], bias: float, data: st.DataObject
) -> None:
    head = entry(weight=np.array(weight, np.float32), bias=bias)
    x = np.array(data.draw(st.lists(st.floats(-1, 1), min_size=len(weight), max_size=len(weight))))
    norm = np.linalg.norm(x)
    if norm > 0:
        margin = head.weight.astype(np.float64) @ (x / norm) + bias
        assert abs(margin) <= head.reach * (1 + 1e-9)


def test_entries_are_found_by_model_weights_and_space(file: Path) -> None:
    found = load_concept(file)
    assert found.entry("nano-flux2", "ab" * 32, "sdxl").positives == 5
    for asked, sentence in (
        (("nano-flux2", "cd" * 32, "sdxl"), r"was learned for nano-flux2 with other weights, not"),
        (("nano-flux2", "ab" * 32, "sd1"), r"for nano-flux2 on flux2 and sdxl latents, not for"),
        (("clip", "ab" * 32, "sdxl"), r"learned for nano-flux2, not for clip \(ab.*learn it for"),
    ):
        with pytest.raises(ModelError, match=sentence):
            found.entry(*asked)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "something"}, "is 'something' of version 1, this latentguard reads"),
        ({"schema_version": 2}, "of version 2, this latentguard reads .* of version 1"),
        ({"name": " "}, "its name must be text"),
        ({"name": "a\nb"}, "not one line"),
        ({"entries": []}, "1 to 64 entries"),
        ({"model": 3}, "its model must be text"),
        ({"model_sha256": "ff"}, "SHA-256"),
        ({"features": "pixels"}, "features must be trunk or joint"),
        ({"positives": -1}, "positives must be a whole number"),
        ({"negatives": 1.5}, "negatives must be a whole number"),
        ({"bias": math.inf}, "head is not finite"),
        ({"bias": None}, "'bias' is missing"),
        ({"figures": []}, "figures are no mapping"),
        ({"statistics": ["other"]}, "'0.statistics.other' is missing"),
        ({"statistics": []}, "other arrays than its entries name"),
        ({"space": "sdxl"}, "two entries are of one model and space"),
    ],
)
def test_a_file_that_was_edited_is_refused(
    file: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PolicyError, match=sentence) as caught:
        parse_concept(edited(file, **changes), "logo.safetensors")
    assert str(caught.value).startswith("logo.safetensors: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", ["weight", "joint", "statistics"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, array: str) -> None:
    wrong: Any = np.array([1, np.nan, 2], np.float32)
    changes = {array: {"positives": wrong} if array == "statistics" else wrong}
    with pytest.raises(PolicyError, match="not a finite number"):
        write_concept(tmp_path / "x.safetensors", "x", [entry(**changes)])
    assert not (tmp_path / "x.safetensors").exists()


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PolicyError, match="is not a concept's file"):
        parse_concept(data)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no such file"):
        load_concept(tmp_path / "none.safetensors")
    with pytest.raises(PolicyError, match=r"not a regular file|cannot be read"):
        load_concept(tmp_path)
    large = tmp_path / "large.safetensors"
    with large.open("wb") as out:
        out.truncate(MAX_BYTES + 1)
    with pytest.raises(PolicyError, match="is larger than 64 MiB"):
        load_concept(large)


# -- in a policy -----------------------------------------------------------------------------


def policy(folder: Path, file: str = "logo.safetensors") -> Path:
    path = folder / "house.yaml"
    path.write_text(POLICY.format(file=file))
    return path


def test_a_policy_is_complete_with_its_examples(file: Path, tmp_path: Path) -> None:
    loaded = load_policy(policy(tmp_path))
    (concept,) = loaded.concepts
    assert loaded.labels_of(concept) == ("examples of our logo",)
    (plain,) = loaded.to_dict()["concepts"]
    found = load_concept(file)
    assert plain["examples"] == {
        "file": "logo.safetensors",
        "sha256": found.sha256,
        "label": "examples of our logo",
        "reach": found.reach,
    }
    # What it was loaded with stays, whatever becomes of the file.
    file.unlink()
    assert loaded.model_copy(update={"on_error": "review"}).examples_of(concept) is not None


def test_the_file_joins_the_digests(file: Path, tmp_path: Path) -> None:
    path = policy(tmp_path)
    before = load_policy(path)
    write_concept(file, "our logo", [entry(bias=-0.3)])
    after = load_policy(path)
    assert before.sha256 != after.sha256
    assert before.prompts_sha256(before.concepts[0]) != after.prompts_sha256(after.concepts[0])


def test_a_policy_made_in_python_has_the_digest_of_its_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(examples: str | None) -> Policy:
        concept = Concept(
            id="a",
            category="b",
            prompts=("logo",),
            examples=examples,
            threshold=Threshold(probability=0.5),
            action="block",
        )
        return Policy(schema_version=1, name="x", version="1", concepts=(concept,))

    monkeypatch.chdir(tmp_path)
    before = made("logo.safetensors").sha256
    assert before != made(None).sha256
    assert before == made("./logo.safetensors").sha256
    write_concept(file, "our logo", [entry(bias=-0.3)])
    assert before != made("logo.safetensors").sha256


def test_what_is_wrong_with_examples_has_a_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PolicyError, match=r"house\.yaml:7: concepts\[0\]\.examples: .*no such file"
    ):
        load_policy(policy(tmp_path, "none.safetensors"))
    path = policy(tmp_path)
    path.write_text(path.read_text().replace("    examples: logo.safetensors\n", ""))
    with pytest.raises(
        PolicyError, match=r"concepts\[0\]\.prompts is missing, and there are no ex"
    ):
        load_policy(path)
    path.write_text(POLICY.format(file="logo.safetensors\n    prompts: ['Examples of our logo']"))
    with pytest.raises(PolicyError, match=r"house\.yaml:7: .*is a prompt, too"):
        load_policy(path)
