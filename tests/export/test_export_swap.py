"""Another policy for an exported file: the same as a new export, or a clear refusal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_helpers import SMALL_B8, constants, differences, expected, sdxl
from exported import photos

from latentguard.encoders import Encoder
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.errors import ModelError, PolicyError
from latentguard.export import Exported, export_onnx, swap_policy, write
from latentguard.export import swap as swap_module
from latentguard.export.graph import BANK
from latentguard.policy.loading import parse_policy
from latentguard.runtime import Guard
from latentguard.runtime.artifact import Artifact, open_artifact
from latentguard.scorer import Scorer

Models = dict[str, Encoder]
Exports = Callable[[str], Exported]

ELSEWHERE = b"""
schema_version: 1
name: elsewhere
version: "1"
space: sd3
concepts:
  - id: guns
    category: weapons
    prompts: [revolver]
    threshold: {probability: 0.5}
    action: block
"""


@pytest.mark.parametrize("name", ["nano", pytest.param("nano-int8", marks=pytest.mark.slow)])
def test_a_swapped_file_judges_by_the_new_policy(
    name: str, exports: Exports, models: Models, tmp_path: Path
) -> None:
    made, out = exports(name), tmp_path / "weapons.onnx"
    before = made.path.read_bytes()
    digest = swap_policy(made.path, "weapons", out, sha256=made.sha256)
    assert made.path.read_bytes() == before
    assert digest == hashlib.sha256(out.read_bytes()).hexdigest()
    scorer, latents = Scorer("weapons", models["nano-flux2"]), photos()
    with Guard(out, sha256=digest) as guard:
        assert guard.policy["name"] == "weapons"
        assert guard.policy["sha256"] == scorer.policy.sha256
        found = guard.scores(latents.tensor.numpy())
        verdicts = guard.scan(latents.tensor.numpy())
    decided = scorer.verdicts(latents)
    assert [v.decision for v in verdicts] == [v.decision for v in decided]
    assert len({v.decision for v in verdicts}) > 1
    if name == "nano":
        assert max(differences(found, expected(scorer, latents)).values()) < 1e-5


def test_only_bank_and_metadata_change(exports: Exports, tmp_path: Path) -> None:
    source = exports("clip").path
    swap_policy(source, "weapons", tmp_path / "b.onnx", LatentCLIP.random(SMALL_B8))
    one, other = onnx.load(source), onnx.load(tmp_path / "b.onnx")
    assert list(one.graph.node) == list(other.graph.node)
    before, after = constants(one), constants(other)
    assert set(before) == set(after)
    same = {key for key in before if np.array_equal(before[key], after[key], equal_nan=True)}
    assert set(before) - same == set(BANK)


def test_there_and_back_is_the_same_file(exports: Exports, tmp_path: Path) -> None:
    source = exports("nano")
    there, back = tmp_path / "there.onnx", tmp_path / "back.onnx"
    swap_policy(source.path, "weapons", there)
    assert swap_policy(there, "family", back) == source.sha256
    # In place.
    assert swap_policy(there, "family", there) == source.sha256


def test_a_swap_keeps_external_data(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "EXTERNAL", 100_000)
    monkeypatch.setattr(write, "EXTERNAL_TENSOR", 10_000)
    made = export_onnx("family", models["b8"], tmp_path / "a.onnx", size=(64, 64))
    swap_policy(made.path, "weapons", tmp_path / "b.onnx", models["b8"])
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "a.data", "b.onnx", "b.data"}
    latents = sdxl(2, (64, 64))
    with Guard(tmp_path / "b.onnx") as guard:
        found = guard.scores(latents.tensor.numpy())
    assert max(differences(found, expected(Scorer("weapons", models["b8"]), latents)).values()) < (
        1e-5
    )


def test_a_source_that_is_exchanged_after_it_was_checked(
    exports: Exports, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was pinned is what gets the new policy."""
    source = tmp_path / "a.onnx"
    source.write_bytes(exports("clip").path.read_bytes())
    swap_policy(source, "weapons", tmp_path / "right.onnx", models["b8"])
    blind = onnx.load(source)
    for tensor in blind.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            tensor.raw_data = bytes(len(tensor.raw_data))

    def check_then_exchange(path: Path, sha256: str | None) -> Artifact:
        found = open_artifact(path, sha256)
        source.write_bytes(blind.SerializeToString())
        return found

    monkeypatch.setattr(swap_module, "open_artifact", check_then_exchange)
    pin = exports("clip").sha256
    swap_policy(source, "weapons", tmp_path / "b.onnx", models["b8"], sha256=pin)
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "right.onnx").read_bytes()


def test_external_data_that_are_exchanged_after_they_were_checked(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "EXTERNAL", 100_000)
    monkeypatch.setattr(write, "EXTERNAL_TENSOR", 10_000)
    made = export_onnx("family", models["b8"], tmp_path / "a.onnx", size=(64, 64))
    swap_policy(made.path, "weapons", tmp_path / "right.onnx", models["b8"])

    def check_then_exchange(path: Path, sha256: str | None) -> Artifact:
        found = open_artifact(path, sha256)
        (tmp_path / "a.data").write_bytes(bytes((tmp_path / "a.data").stat().st_size))
        return found

    monkeypatch.setattr(swap_module, "open_artifact", check_then_exchange)
    swap_policy(made.path, "weapons", tmp_path / "b.onnx", models["b8"], sha256=made.sha256)
    assert (tmp_path / "b.data").read_bytes() == (tmp_path / "right.data").read_bytes()


# --- refusals --------------------------------------------------------------------------------


@pytest.fixture
def file(exports: Exports) -> Path:
    return exports("clip").path


def test_a_bank_of_another_model(file: Path, tmp_path: Path, models: Models) -> None:
    out = tmp_path / "b.onnx"
    same_name = LatentCLIP.random(SMALL_B8, seed=1)
    for other in (same_name, models["b4"], models["nano-sdxl"]):
        with pytest.raises(ModelError, match=r"was exported from latent-clip-p8-random .* cannot"):
            swap_policy(file, "weapons", out, other)
    assert not out.exists()


def test_a_policy_of_another_space(file: Path, tmp_path: Path, models: Models) -> None:
    policy = parse_policy(ELSEWHERE, "elsewhere.yaml")
    with pytest.raises(PolicyError, match="'elsewhere' is for sd3, not sdxl"):
        swap_policy(file, policy, tmp_path / "b.onnx", models["b8"])


def test_a_file_that_is_not_the_pinned_one(file: Path, tmp_path: Path, models: Models) -> None:
    with pytest.raises(ModelError, match="not the pinned"):
        swap_policy(file, "weapons", tmp_path / "b.onnx", models["b8"], sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_somebody_else(tmp_path: Path, models: Models) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([], "g", [value], [value])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="has no latentguard metadata"):
        swap_policy(tmp_path / "a.onnx", "weapons", tmp_path / "b.onnx", models["b8"])
    with pytest.raises(ModelError, match="cannot be read"):
        swap_policy(tmp_path / "no.onnx", "weapons", tmp_path / "b.onnx", models["b8"])


def test_a_damaged_file(file: Path, tmp_path: Path, models: Models) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(ModelError, match="damaged or edited"):
        swap_policy(tmp_path / "a.onnx", "weapons", tmp_path / "b.onnx", models["b8"])
