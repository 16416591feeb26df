"""What stands in an exported file: standard operators, metadata, hashes, external data."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_helpers import constants, nodes, sdxl

from latentguard.encoders import Encoder
from latentguard.errors import ModelError
from latentguard.export import Checked, Exported, export_onnx, write
from latentguard.export.graph import BANK
from latentguard.ops.onnx import OPSET
from latentguard.policy import load_policy
from latentguard.runtime import Guard
from latentguard.runtime.artifact import DIGEST, METADATA, inner_digest
from latentguard.scorer import Scorer

Models = dict[str, Encoder]
Exports = Callable[[str], Exported]

SLOW = ("nano-int8", "nano-dynamic", "nano-sdxl")
ALL = [
    *("nano", "nano-fp16"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    *("clip", "clip-fp16", "clip-int8", "clip-dynamic", "clip-open"),
]


@pytest.mark.parametrize("name", ALL)
def test_standard_operators_alone(name: str, exports: Exports) -> None:
    model = onnx.load(exports(name).path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in nodes(model.graph)} <= {"", "ai.onnx"}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert not model.functions


@pytest.mark.parametrize("name", ALL)
def test_inputs_and_outputs(name: str, exports: Exports) -> None:
    model = onnx.load(exports(name).path)
    names = [value.name for value in model.graph.output]
    assert names[:4] == ["probability", "margin", "best_prompt", "embedding"]
    flux2 = name.startswith("nano") and name != "nano-sdxl"
    assert names[4:] == (["heatmap"] if flux2 or name == "clip-open" else [])
    (given,) = model.graph.input
    assert given.name == "latents"
    kind = given.type.tensor_type
    assert kind.elem_type == onnx.TensorProto.FLOAT
    images, channels, height, width = kind.shape.dim
    assert images.dim_param
    assert channels.dim_value == (32 if flux2 else 4)
    assert bool(height.dim_param and width.dim_param) == (name == "clip-open")


def test_nothing_tells_of_the_machine_that_exported(exports: Exports) -> None:
    data = exports("nano").path.read_bytes()
    for path in (Path(write.__file__).parents[2], Path.home(), exports("nano").path.parent):
        assert str(path).encode() not in data or str(path) == "/"


@pytest.mark.parametrize(
    ("name", "precision", "calibration"),
    [
        ("nano-fp16", "fp16", None),
        pytest.param("nano-int8", "int8", "25 latents of flux2", marks=pytest.mark.slow),
    ],
)
def test_metadata(
    name: str, precision: str, calibration: str | None, exports: Exports, models: Models
) -> None:
    model = onnx.load(exports(name).path)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert set(entries) == {METADATA, DIGEST}
    found = json.loads(entries[METADATA])
    encoder, policy = models["nano-flux2"], load_policy("family")
    bank = Scorer(policy, encoder).bank
    assert found["schema_version"] == 1
    assert found["policy"] == json.loads(json.dumps(policy.to_dict()))
    assert found["policy"]["sha256"] == policy.sha256
    assert all("threshold" in concept for concept in found["policy"]["concepts"])
    assert found["prompts"] == list(bank.prompts)
    assert found["covered"] == list(bank.covered)
    assert not all(found["covered"])
    assert found["seen"] == list(bank.seen)
    assert "jeans" in found["unseen_contrast"]
    assert found["model"]["name"] == "nano-flux2"
    assert found["model"]["sha256"] == encoder.sha256
    assert (found["space"], found["scaled"], found["channels"]) == ("flux2", True, 32)
    assert (found["height"], found["width"], found["packed_patch"]) == (32, 32, 2)
    assert (found["precision"], found["calibration"]) == (precision, calibration)
    assert (found["dim"], found["logit_scale"]) == (encoder.dim, encoder.logit_scale)
    assert found["files"] == {}


def test_hashes(exports: Exports) -> None:
    made = exports("nano")
    data = made.path.read_bytes()
    assert made.sha256 == hashlib.sha256(data).hexdigest()
    assert made.bytes == len(data)
    entries = {entry.key: entry.value for entry in onnx.load(made.path).metadata_props}
    assert entries[DIGEST] == inner_digest(data)


def test_the_same_export_is_the_same_file(tmp_path: Path, models: Models) -> None:
    made = [
        export_onnx("family", models["b8"], tmp_path / name, size=(64, 64))
        for name in ("one.onnx", "two.onnx")
    ]
    assert made[0].sha256 == made[1].sha256


@pytest.mark.parametrize(
    "name",
    ["nano", "nano-fp16", pytest.param("nano-int8", marks=pytest.mark.slow), "clip-int8"],
)
def test_the_concept_bank_is_four_float32_initializers(
    name: str, exports: Exports, models: Models
) -> None:
    scorer = Scorer("family", models["nano-flux2" if name.startswith("nano") else "b8"])
    found = constants(onnx.load(exports(name).path))
    wanted = (
        *(scorer.bank.embeddings, scorer.bank.segments),
        *(scorer.bank.contrast, scorer.bank.contrast_segments),
    )
    for key, value in zip(BANK, wanted, strict=True):
        assert found[key].dtype == value.numpy().dtype
        assert np.array_equal(found[key], value.numpy())


@pytest.mark.slow
def test_smaller_precisions_are_smaller_files(exports: Exports) -> None:
    size = exports("nano").bytes
    assert exports("nano-fp16").bytes < 0.6 * size
    assert exports("nano-int8").bytes < 0.4 * size


# --- external data ---------------------------------------------------------------------------


@pytest.fixture
def external(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """An export whose weights are taken for too many for one file."""
    monkeypatch.setattr(write, "EXTERNAL", 100_000)
    monkeypatch.setattr(write, "EXTERNAL_TENSOR", 10_000)
    return export_onnx("family", models["b8"], tmp_path / "guard.onnx", size=(64, 64))


def test_large_weights_lie_beside_the_file(external: Exported, exports: Exports) -> None:
    beside = external.path.with_name("guard.data")
    assert sorted(path.name for path in external.path.parent.iterdir()) == [
        "guard.data",
        "guard.onnx",
    ]
    assert external.path.stat().st_size < beside.stat().st_size
    assert external.bytes == external.path.stat().st_size + beside.stat().st_size
    latents = sdxl(2, (64, 64)).tensor.numpy()
    with Guard(external.path, sha256=external.sha256) as guard:
        files = guard.metadata["files"]
        found = guard.scores(latents)
    assert files == {"guard.data": hashlib.sha256(beside.read_bytes()).hexdigest()}
    with Guard(exports("clip").path) as whole:
        assert np.array_equal(found["margin"], whole.scores(latents)["margin"])


def test_external_data_are_part_of_the_artifact(external: Exported, tmp_path: Path) -> None:
    beside = external.path.with_name("guard.data")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = shutil.copy(external.path, elsewhere)
    with pytest.raises(ModelError, match=r"guard\.data: cannot be read"):
        Guard(moved)
    data = bytearray(beside.read_bytes())
    data[1000] ^= 1
    beside.write_bytes(data)
    with pytest.raises(ModelError, match=r"guard\.data: does not have the SHA-256"):
        Guard(external.path, sha256=external.sha256)


def test_former_names_of_a_comparison() -> None:
    checked = Checked(9, True, 0.0, 0.0, 1.0, same_decisions=8, escalated=3)
    make: Any = Checked
    with pytest.warns(DeprecationWarning, match="same is called same_decisions now"):
        assert checked.same == 8
    with pytest.warns(DeprecationWarning, match="sent is called escalated now"):
        assert make(9, True, 0.0, 0.0, 1.0, 8, sent=3) == checked
