"""Files that are not what they should be: one sentence says so, and no Guard comes of them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from runtime_helpers import ROOT

from latentguard.errors import ModelError
from latentguard.export import write as write_module
from latentguard.export.metadata import write_metadata
from latentguard.runtime import Guard
from latentguard.runtime import scorer as guard_module
from latentguard.runtime.artifact import _KEYS, DIGEST, METADATA, open_artifact
from latentguard.scan import Scan

Edit = Callable[[onnx.ModelProto, dict[str, Any]], None]
QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def data(artifact: Path) -> bytes:
    return artifact.read_bytes()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], str]:
    """The sentence with which a file of these bytes is refused."""

    def check(content: bytes) -> str:
        path = tmp_path / "hostile.onnx"
        path.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            Guard(path, threads=1)
        text = str(caught.value)
        assert "hostile.onnx" in text
        assert "\n" not in text
        assert len(text) < 700
        return text

    return check


@pytest.fixture
def edited(data: bytes) -> Callable[[Edit], bytes]:
    """The file, edited by somebody who computes its inner digest anew."""

    def edit(change: Edit) -> bytes:
        model = onnx.load_from_string(data)
        metadata = json.loads(next(e.value for e in model.metadata_props if e.key == METADATA))
        change(model, metadata)
        return write_metadata(model, metadata)

    return edit


def locked(margin: Any) -> dict[str, Any]:
    """A lock with one calibrated margin."""
    names = {"model": "nano-flux2", "model_sha256": "0" * 64, "space": "flux2", "concept": "guns"}
    return {"entries": [names | {"noise_level": 0, "margins": [{"fpr": 0.01, "margin": margin}]}]}


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(t for t in model.graph.initializer if t.name == name)
    return found


# -- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no graph"),
        (b"not a model at all", "is no readable .onnx file"),
        (b"PK\x03\x04" + b"\0" * 64, "is no readable .onnx file"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "announced"),
        (b"\xff" * 40, "a number of more than ten bytes"),
        (b"\x0f\x01", "wire type 7"),
        (b"\x00\x01", "field number 0"),
        (b"\x38\x01", "a number where bytes are expected"),
        (b"\x3a\x00", "has no latentguard metadata"),
        (b"\x72\x04\x0a\x02\xff\xfe", "text that is not UTF-8"),
    ],
)
def test_bytes_that_are_no_model(
    refused: Callable[[bytes], str], content: bytes, message: str
) -> None:
    assert message in refused(content)


@given(content=st.binary(max_size=600))
@QUICK
def test_random_bytes(refused: Callable[[bytes], str], content: bytes) -> None:
    refused(content)


@given(seed=st.integers(0, 2**32))
@QUICK
def test_a_damaged_file(refused: Callable[[bytes], str], data: bytes, seed: int) -> None:
    chance = random.Random(seed)
    damaged = bytearray(data)
    if chance.random() < 0.3:
        del damaged[chance.randrange(len(data)) :]
    else:
        # What is not a weight stands at the beginning and at the end.
        reach = chance.choice([2_000, 60_000, len(data)])
        at = chance.randrange(reach) * chance.choice([1, -1])
        damaged[at] ^= 1 << chance.randrange(8)
    refused(bytes(damaged))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    for path, message in (
        (tmp_path / "missing.onnx", "cannot be read: No such file"),
        (tmp_path, "cannot be read|is not a regular file"),
        (tmp_path / "fifo.onnx", "is not a regular file"),
        ("nul\0byte.onnx", "cannot be read: .*null byte"),
    ):
        with pytest.raises(ModelError, match=message):
            Guard(path)


# -- the pin ---------------------------------------------------------------------------------


def test_the_pin(artifact: Path, data: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(data).hexdigest()
    assert Guard(artifact, sha256=f" {digest.upper()}\n", threads=1).sha256 == digest
    with pytest.raises(ModelError, match=f"has SHA-256 {digest}, not the pinned {'0' * 64}"):
        Guard(artifact, sha256="0" * 64)
    for wrong in ("", "abc", digest[:-1], digest + "0", "é" * 64):
        with pytest.raises(ModelError, match="64 hexadecimal digits"):
            Guard(artifact, sha256=wrong)


def test_only_the_pin_tells_what_somebody_signed_anew(
    artifact: Path, edited: Callable[[Edit], bytes], tmp_path: Path
) -> None:
    def lenient(model: onnx.ModelProto, metadata: dict[str, Any]) -> None:
        for concept in metadata["policy"]["concepts"]:
            concept["threshold"]["value"] = 0.999999

    path = tmp_path / "lenient.onnx"
    path.write_bytes(edited(lenient))
    Guard(path, threads=1)  # its own digest fits
    with pytest.raises(ModelError, match="not the pinned"):
        Guard(path, sha256=hashlib.sha256(artifact.read_bytes()).hexdigest())


# -- metadata --------------------------------------------------------------------------------


def test_metadata_that_are_missing_or_edited(
    refused: Callable[[bytes], str], data: bytes, edited: Callable[[Edit], bytes]
) -> None:
    def without(*keys: str) -> bytes:
        model = onnx.load_from_string(data)
        kept = [entry for entry in model.metadata_props if entry.key not in keys]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        changed: bytes = model.SerializeToString()
        return changed

    assert "has no latentguard metadata" in refused(without(METADATA, DIGEST))
    assert "has no latentguard metadata" in refused(without(DIGEST))
    assert "has no latentguard metadata" in refused(without(METADATA))
    changed = data.replace(b'\\"on_error\\": \\"block\\"', b'\\"on_error\\": \\"allow\\"')
    changed = data.replace(b'"on_error": "block"', b'"on_error": "allow"')
    assert changed != data
    assert "damaged or edited" in refused(changed)
    entry = onnx.StringStringEntryProto(key=METADATA, value="{}").SerializeToString()
    twice = data + b"\x72" + bytes([len(entry)]) + entry
    assert "holds the metadata 'latentguard' twice" in refused(twice)
    stamp = onnx.load_from_string(data)
    next(e for e in stamp.metadata_props if e.key == DIGEST).value = "é"
    assert "damaged or edited" in refused(stamp.SerializeToString())


@pytest.mark.parametrize("version", [2, 0, True, "1", 1.0, None, [1], "x" * 5000])
def test_an_unknown_schema_version(
    refused: Callable[[bytes], str], edited: Callable[[Edit], bytes], version: Any
) -> None:
    text = refused(edited(lambda _, metadata: metadata.update(schema_version=version)))
    assert "schema_version must be 1, got" in text


@pytest.mark.parametrize("key", [key for key in _KEYS if key != "schema_version"])
def test_a_key_that_is_missing_or_of_another_type(
    refused: Callable[[bytes], str], edited: Callable[[Edit], bytes], key: str
) -> None:
    assert f"have no valid {key}" in refused(edited(lambda _, metadata: metadata.pop(key)))
    wrong = refused(
        edited(lambda _, metadata: metadata.update({key: 1.5 if key != "logit_scale" else "1"}))
    )
    assert f"have no valid {key}" in wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "flux9"}, "space"),
        ({"space": "sdxl"}, "channels"),
        ({"channels": 4}, "channels"),
        ({"packed_patch": 0}, "packed_patch"),
        ({"logit_scale": -1.0}, "logit_scale"),
        ({"height": -32, "width": -32}, "height and width"),
        ({"height": None}, "height and width"),
        ({"height": True, "width": True}, "height"),
        ({"model": {"name": "nano-flux2"}}, "model"),
        ({"model": {"name": "nano-flux2", "sha256": 5}}, "model"),
        ({"prompts": [1, 2]}, "prompts"),
        ({"covered": [1] * 13}, "covered"),
        ({"covered": []}, "policy"),
        ({"seen": [True]}, "seen"),
        ({"seen": [1] * 53}, "seen"),
        ({"seen": "yes"}, "seen"),
        ({"unseen_contrast": [1]}, "unseen_contrast"),
        ({"unseen_contrast": "jeans"}, "unseen_contrast"),
        ({"policy": {}}, "policy"),
    ],
)
def test_values_that_do_not_fit(
    refused: Callable[[bytes], str],
    edited: Callable[[Edit], bytes],
    changes: dict[str, Any],
    message: str,
) -> None:
    text = refused(edited(lambda _, metadata: metadata.update(changes)))
    assert f"have no valid {message}" in text


def hide_rifle(metadata: dict[str, Any]) -> None:
    metadata["seen"][metadata["prompts"].index("rifle")] = False


def test_a_prompt_that_was_not_seen_is_named_by_the_runtime(
    edited: Callable[[Edit], bytes], tmp_path: Path, arrays: np.ndarray
) -> None:
    path = tmp_path / "partly.onnx"
    path.write_bytes(edited(lambda _, metadata: hide_rifle(metadata)))
    with Guard(path, threads=1) as guard:
        (verdict,) = guard.scan(arrays[:1])
    unseen = {concept.id: concept.unseen for concept in verdict.concepts}
    assert unseen["firearms"] == ("rifle",)
    assert len(unseen["nudity"]) == 5
    assert verdict.reason.endswith("prompts not checked of 'firearms': 'rifle'")


def test_a_prompt_that_was_not_seen_is_refused_where_the_policy_says_so(
    refused: Callable[[bytes], str], edited: Callable[[Edit], bytes]
) -> None:
    def strict(_: onnx.ModelProto, metadata: dict[str, Any]) -> None:
        metadata["policy"]["uncovered"] = "error"
        metadata["seen"] = [True] * len(metadata["prompts"])
        metadata["covered"] = [True] * len(metadata["covered"])
        hide_rifle(metadata)

    assert "the model does not see 'rifle' of 'firearms'" in refused(edited(strict))


def test_a_file_from_before_prompts_were_recorded_loads_and_scan_says_so(
    edited: Callable[[Edit], bytes], tmp_path: Path, arrays: np.ndarray
) -> None:
    def former(_: onnx.ModelProto, metadata: dict[str, Any]) -> None:
        del metadata["seen"], metadata["unseen_contrast"]

    path = tmp_path / "former.onnx"
    path.write_bytes(edited(former))
    with Guard(path, threads=1) as guard:
        (verdict,) = guard.scan(arrays[:1])
    assert [c.id for c in verdict.concepts if not c.covered] == [
        "tobacco",
        "casino",
        "nudity",
        "gore",
    ]
    run = Scan(ROOT / "examples/latents.pt", model=path, runtime="onnx", device="cpu")
    assert any("export it again" in note for note in run.notes)


@pytest.mark.parametrize(
    "value", ["[1]", '"x"', "{", "[" * 100_000, "1" * 5000, '{"schema_version": NaN}', ""]
)
def test_metadata_that_are_no_mapping(
    refused: Callable[[bytes], str], data: bytes, value: str
) -> None:
    from latentguard.runtime.artifact import inner_digest

    model = onnx.load_from_string(data)
    next(e for e in model.metadata_props if e.key == METADATA).value = value
    stamp = next(e for e in model.metadata_props if e.key == DIGEST)
    stamp.value = inner_digest(model.SerializeToString())
    text = refused(model.SerializeToString())
    assert "its metadata must be a mapping" in text or "is no readable .onnx file" in text


def test_a_scale_beyond_all_numbers(refused: Callable[[bytes], str], data: bytes) -> None:
    from latentguard.runtime.artifact import inner_digest

    model = onnx.load_from_string(data)
    entry = next(e for e in model.metadata_props if e.key == METADATA)
    scale = json.loads(entry.value)["logit_scale"]
    entry.value = entry.value.replace(f'"logit_scale": {scale}', '"logit_scale": 1e999')
    assert "1e999" in entry.value
    stamp = next(e for e in model.metadata_props if e.key == DIGEST)
    stamp.value = inner_digest(model.SerializeToString())
    assert "have no valid logit_scale" in refused(model.SerializeToString())


@pytest.mark.parametrize("on_error", ["block", "allow"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda policy: policy["concepts"][0].pop("threshold"),
        lambda policy: policy["concepts"][0]["threshold"].update(kind="maybe"),
        lambda policy: policy["concepts"][0].update(action="shrug"),
        lambda policy: policy["concepts"][0].update(prompts=["one more"] * 40),
        lambda policy: policy["concepts"][0]["threshold"].update(value=10**400),
        lambda policy: policy["concepts"][0].update(noise_window=["nan", None]),
        lambda policy: policy.update(lock=locked("nan")),
        lambda policy: policy.update(lock=locked("inf")),
        lambda policy: policy["concepts"][0]["threshold"].update(kind="fpr", value=0.01),
        lambda policy: policy.update(schema_version=2),
        lambda policy: policy.update(concepts=[None] * len(policy["concepts"])),
    ],
)
def test_a_policy_that_cannot_be_read(
    refused: Callable[[bytes], str],
    edited: Callable[[Edit], bytes],
    damage: Callable[[dict[str, Any]], Any],
    on_error: str,
) -> None:
    """Not even where errors are allowed: such a file judges nothing at all."""

    def change(_: onnx.ModelProto, metadata: dict[str, Any]) -> None:
        metadata["policy"]["on_error"] = on_error
        damage(metadata["policy"])

    assert "does not fit its policy" in refused(edited(change))


# -- the graph -------------------------------------------------------------------------------


def foreign_node(model: onnx.ModelProto, _: Any) -> None:
    model.graph.node[0].domain = "com.microsoft"


def foreign_set(model: onnx.ModelProto, _: Any) -> None:
    model.opset_import.append(helper.make_opsetid("com.example.shell", 1))


def function(model: onnx.ModelProto, _: Any) -> None:
    sets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [], sets))


def training(model: onnx.ModelProto, _: Any) -> None:
    model.training_info.add()


def sparse(model: onnx.ModelProto, _: Any) -> None:
    model.graph.sparse_initializer.add()


def branch(model: onnx.ModelProto, _: Any) -> None:
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["x"], then_branch=inner))


def more_inputs(model: onnx.ModelProto, _: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("switch", TensorProto.FLOAT, [1]))


def fewer_outputs(model: onnx.ModelProto, _: Any) -> None:
    del model.graph.output[0]


def other_outputs(model: onnx.ModelProto, _: Any) -> None:
    model.graph.output[0].name = "certainty"


def unknown_operator(model: onnx.ModelProto, _: Any) -> None:
    model.graph.node[0].op_type = "Explode"


def dangling(model: onnx.ModelProto, _: Any) -> None:
    model.graph.node[3].input[0] = "nowhere"


def huge_tensor(model: onnx.ModelProto, _: Any) -> None:
    tensor = max(model.graph.initializer, key=lambda item: len(item.raw_data))
    tensor.dims[:] = [2**20, 2**20, 2**10]


def no_numbers(model: onnx.ModelProto, _: Any) -> None:
    max(model.graph.initializer, key=lambda item: len(item.raw_data)).ClearField("raw_data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (foreign_node, "has an operator of the operator set 'com.microsoft'"),
        (foreign_set, "imports the operator set 'com.example.shell'"),
        (function, "functions or training data"),
        (training, "functions or training data"),
        (sparse, "sparse tensors"),
        (branch, "a graph within its graph"),
        (more_inputs, "must have the input latents"),
        (fewer_outputs, "must have the input latents and the outputs probability"),
        (other_outputs, "certainty"),
        (unknown_operator, "ONNX Runtime refuses it"),
        (dangling, "ONNX Runtime refuses it"),
        (huge_tensor, "ONNX Runtime refuses it"),
        (no_numbers, "ONNX Runtime refuses it"),
    ],
)
def test_graphs(
    refused: Callable[[bytes], str], edited: Callable[[Edit], bytes], change: Edit, message: str
) -> None:
    assert message in refused(edited(change))


def test_a_second_graph(refused: Callable[[bytes], str], data: bytes) -> None:
    assert "holds more than one graph" in refused(data + b"\x3a\x00")


@pytest.mark.parametrize(
    "change",
    [
        lambda bank: bank["bank.embeddings"][:, :512],
        lambda bank: bank["bank.embeddings"][:-1],
        lambda bank: bank["bank.embeddings"][None],
    ],
)
def test_a_bank_of_another_model_or_policy(
    refused: Callable[[bytes], str], edited: Callable[[Edit], bytes], change: Any
) -> None:
    def replace(model: onnx.ModelProto, _: Any) -> None:
        tensor = initializer(model, "bank.embeddings")
        array = change({tensor.name: numpy_helper.to_array(tensor)})
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))

    text = refused(edited(replace))
    assert "its concept bank must hold 54 prompts of 13 concepts in 1008 dimensions" in text


def test_a_bank_that_is_missing(
    refused: Callable[[bytes], str], edited: Callable[[Edit], bytes]
) -> None:
    def remove(model: onnx.ModelProto, _: Any) -> None:
        initializer(model, "bank.segments").name = "elsewhere"

    assert "its concept bank must hold" in refused(edited(remove))


def sliced(name: str) -> Edit:
    """Give the first row of an output only, whatever the number of images."""

    def change(model: onnx.ModelProto, _: Any) -> None:
        node = next(node for node in model.graph.node if name in node.output)
        node.output[list(node.output).index(name)] = "all_rows"
        for label, value in (("from", 0), ("to", 1)):
            array = np.array([value], np.int64)
            model.graph.initializer.append(numpy_helper.from_array(array, label))
        for other in model.graph.node:
            other.input[:] = ["all_rows" if item == name else item for item in other.input]
        inputs = ["all_rows", "from", "to", "from"]
        model.graph.node.append(helper.make_node("Slice", inputs, [name]))

    return change


@pytest.mark.parametrize("name", ["margin", "probability", "best_prompt"])
def test_a_graph_that_gives_fewer_rows_than_images(
    edited: Callable[[Edit], bytes], tmp_path: Path, arrays: np.ndarray, name: str
) -> None:
    path = tmp_path / "short.onnx"
    path.write_bytes(edited(sliced(name)))
    verdicts = Guard(path, threads=1).scan(arrays[:3])
    assert len(verdicts) == 3
    for verdict in verdicts:
        assert verdict.decision == "block"
        assert f"gives 1 rows of {name}" in str(verdict.error)


# -- external data ---------------------------------------------------------------------------


@pytest.fixture
def beside(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The export as one of more than 2 GB is written: weights in a file of their own."""
    monkeypatch.setattr(write_module, "EXTERNAL", 1000)
    model = onnx.load_from_string(data)
    metadata = json.loads(next(e.value for e in model.metadata_props if e.key == METADATA))
    folder = tmp_path / "large"
    folder.mkdir()
    files = write_module.write(model, metadata, folder / "large.onnx")
    assert [file.name for file in files] == ["large.onnx", "large.data"]
    assert files[1].stat().st_size > 5_000_000
    return files[0]


def test_external_data(beside: Path, guard: Guard, arrays: np.ndarray) -> None:
    digest = hashlib.sha256(beside.read_bytes()).hexdigest()
    found = Guard(beside, sha256=digest, threads=1).scores(arrays[:4])
    for name, values in guard.scores(arrays[:4]).items():
        assert np.array_equal(found[name], values)


def test_the_pin_covers_external_data(beside: Path) -> None:
    digest = hashlib.sha256(beside.read_bytes()).hexdigest()
    weights = beside.with_suffix(".data")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=r"large.data: does not have the SHA-256 that large.onnx"):
        Guard(beside, sha256=digest)
    weights.unlink()
    with pytest.raises(ModelError, match=r"large.data: cannot be read: No such file"):
        Guard(beside, sha256=digest)


def test_external_data_behind_a_link(beside: Path, tmp_path: Path) -> None:
    weights = beside.with_suffix(".data")
    shutil.move(weights, tmp_path / "moved.data")
    weights.symlink_to(tmp_path / "moved.data")
    with pytest.raises(ModelError, match=r"large.data: is a link"):
        Guard(beside)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ModelError, match=r"large.data: is not a regular file"):
        Guard(beside)


@pytest.mark.parametrize(
    "location",
    ["../weights.data", "/etc/passwd", "a/b.data", ".hidden", "", "..", "C:\\x", "x\0y", "a" * 300],
)
@pytest.mark.parametrize("listed", [True, False])
def test_external_data_that_leave_the_folder(
    refused: Callable[[bytes], str],
    edited: Callable[[Edit], bytes],
    tmp_path: Path,
    location: str,
    listed: bool,
) -> None:
    (tmp_path.parent / "weights.data").write_bytes(b"\0" * 64)

    def change(model: onnx.ModelProto, metadata: dict[str, Any]) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location
        if listed:
            metadata["files"] = {location: hashlib.sha256(b"\0" * 64).hexdigest()}

    text = refused(edited(change))
    assert ("under a plain name" if listed else "which its metadata do not list") in text


def test_external_data_that_are_shorter_than_announced(beside: Path) -> None:
    def stretch(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key in ("offset", "length"):
                    entry.value = str(2**40)

    model = onnx.load(beside, load_external_data=False)
    metadata = json.loads(next(e.value for e in model.metadata_props if e.key == METADATA))
    stretch(model)
    beside.write_bytes(write_metadata(model, metadata))
    with pytest.raises(ModelError, match="ONNX Runtime refuses it"):
        Guard(beside)


def test_what_was_looked_at_is_what_runs(
    beside: Path, guard: Guard, arrays: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files are replaced after they were looked at, before there is a session."""

    def look_then_replace(path: Path, sha256: str | None) -> Any:
        found = open_artifact(path, sha256)
        for file in (beside, beside.with_suffix(".data")):
            file.write_bytes(b"something else")
        return found

    monkeypatch.setattr(guard_module, "open_artifact", look_then_replace)
    found = Guard(beside, threads=1).scores(arrays[:2])
    assert np.array_equal(found["margin"], guard.scores(arrays[:2])["margin"])
