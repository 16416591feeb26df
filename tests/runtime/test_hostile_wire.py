"""Bytes that readers of protocol buffers understand differently: no Guard comes of them.

What a file of ours must not hold (operators of other sets, branches, files elsewhere) could be
hidden from whoever looks into it and shown to ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import helper, numpy_helper
from tiny import entry, field, key, varint

from latentguard.errors import ModelError
from latentguard.runtime import Guard
from latentguard.runtime.artifact import open_artifact

LATENTS = np.random.default_rng(0).standard_normal((1, 32, 8, 8)).astype(np.float32)


def written(path: Path, content: bytes, **metadata: Any) -> Path:
    path.write_bytes(tiny.signed(content, json.dumps(tiny.metadata(**metadata))))
    return path


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """The sentence with which a file of these top-level fields is refused."""

    def check(content: bytes, **metadata: Any) -> str:
        path = written(tmp_path / "hostile.onnx", content, **metadata)
        with pytest.raises(ModelError) as caught:
            Guard(path, threads=1)
        text = str(caught.value)
        assert text.startswith(f"{path}: ")
        assert "\n" not in text
        assert len(text) < 700
        return text

    return check


def without_graph() -> bytes:
    made = tiny.model()
    made.ClearField("graph")
    data: bytes = made.SerializeToString()
    return data


def with_node(node: bytes, margin: str = "margin") -> bytes:
    """The small model with one more node, before the one that makes probabilities of `margin`."""
    graph = tiny.model().graph
    nodes = list(graph.node)
    del graph.node[:]
    at = next(i for i, one in enumerate(nodes) if one.op_type == "Sigmoid")
    nodes[at].input[0] = margin
    raw = [one.SerializeToString() for one in nodes]
    raw.insert(at, node)
    content = b"".join(field(1, one) for one in raw) + graph.SerializeToString()
    return without_graph() + field(7, content)


def with_weights(tensor: bytes) -> bytes:
    """The small model with these bytes as its matrix."""
    graph = tiny.model().graph
    kept = [one for one in graph.initializer if one.name != "w"]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return without_graph() + field(7, graph.SerializeToString() + field(5, tensor))


def located(location: bytes, wide: bool) -> bytes:
    """A matrix of 32 x 16 numbers in another file."""
    place = field(1, b"location") + field(2, location)
    span = [field(1, name) + field(2, value) for name, value in ((b"offset", b"0"),)]
    dims = key(1, 0) + varint(32) + key(1, 0) + varint(16) + key(2, 0) + varint(1)
    entries = field(13, place, wide) + b"".join(field(13, one) for one in span)
    return dims + field(8, b"w") + entries + key(14, 0) + varint(1)


def test_the_small_model_is_accepted(tmp_path: Path) -> None:
    path = written(tmp_path / "tiny.onnx", tiny.model().SerializeToString())
    assert Guard(path, threads=1).scan(LATENTS)[0].error is None


# -- field numbers that are cut to 29 bits ---------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_an_operator_of_another_set(refused: Callable[..., str], wide: bool) -> None:
    node = helper.make_node("Gelu", ["margin"], ["gelu"]).SerializeToString()
    imported = field(8, field(1, b"com.microsoft", wide) + key(2, 0) + varint(1))
    content = with_node(node + field(7, b"com.microsoft", wide), "gelu")
    assert ("29 bits" if wide else "operator set") in refused(content + imported)


@pytest.mark.parametrize("wide", [False, True])
def test_a_branch(refused: Callable[..., str], wide: bool) -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["margin"], ["o"])],
        "inner",
        [],
        [helper.make_tensor_value_info("o", 1, None)],
    ).SerializeToString()
    branches = b"".join(
        field(5, field(1, name) + field(6, inner, wide) + key(20, 0) + varint(5))
        for name in (b"then_branch", b"else_branch")
    )
    node = helper.make_node("If", ["condition"], ["chosen"]).SerializeToString() + branches
    content = with_node(node, "chosen")
    assert ("29 bits" if wide else "a graph within its graph") in refused(content)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("location", [b"secret.bin", b"elsewhere/secret.bin", b"/tmp/secret.bin"])
def test_numbers_in_a_file_that_no_pin_covers(
    refused: Callable[..., str], tmp_path: Path, location: bytes, wide: bool
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        np.full(512, 3.0, np.float32).tofile(folder / "secret.bin")
    text = refused(with_weights(located(location, wide)))
    assert ("29 bits" if wide else "which its metadata do not list") in text


def test_a_pinned_file_runs_what_was_hashed(tmp_path: Path, monkeypatch: Any) -> None:
    """A file beside the pinned one is exchanged: the SHA-256 stays, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "pinned.onnx", with_weights(located(b"secret.bin", True)))
    pin = hashlib.sha256(path.read_bytes()).hexdigest()
    for value in (3.0, -3.0):
        np.full(512, value, np.float32).tofile(tmp_path / "secret.bin")
        with pytest.raises(ModelError, match="29 bits"):
            Guard(path, pin, threads=1)


# -- other forms than the one ----------------------------------------------------------------

NODE = helper.make_node("Identity", ["margin"], ["other"]).SerializeToString()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (field(99, b"x"), "field 99"),
        (key(1, 3) + key(1, 4), "wire type 3"),
        (key(1, 4), "wire type 4"),
        (key(1, 6), "wire type 6"),
        (key(2, 0) + varint(5), "a number where bytes are"),
        (varint(2 << 3 | 2, padding=1) + b"\x00", "longer than it needs"),
        (key(2) + varint(0, padding=3), "longer than it needs"),
        (key(5, 0) + varint(1, padding=8), "longer than it needs"),
        (key(5, 0) + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (varint(2**40 << 3 | 2) + b"\x00", "29 bits"),
        (field(7, b""), "more than one graph"),
        (field(2, b"a") + field(2, b"b"), "more than one producer_name"),
        (field(4, b"\xff"), "text that is not UTF-8"),
        (field(8, field(1, b"") + field(1, b"com.microsoft")), "more than one domain"),
        (field(14, field(1, b"a") + field(1, b"latentguard")), "more than one key"),
        (field(20, b""), "functions or training data"),
        (field(26, b""), "spread over devices"),
        (entry("ort_config", "{}"), "holds the metadata 'ort_config'"),
    ],
)
def test_a_model_in_another_form(refused: Callable[..., str], content: bytes, says: str) -> None:
    assert says in refused(tiny.model().SerializeToString() + content)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (field(7, b"") + field(7, b"com.microsoft"), "more than one domain"),
        (field(4, b"Gelu"), "more than one op_type"),
        (field(11, b"x"), "field 11"),
        (field(10, b""), "spread over devices"),
        (field(5, field(1, b"a") + field(21, b"b")), "functions or training data"),
        (field(5, field(1, b"a") + field(22, b"")), "sparse tensors"),
        (field(5, field(1, b"a") + field(14, b"")), "values that are no tensors"),
        (field(5, field(1, b"a") + field(5, b"") * 2), "more than one t "),
        (field(5, field(1, b"a") + key(20, 0) + varint(77)), "77 in type"),
        (field(5, field(1, b"a") + key(2, 0) + varint(1)), "wire type 0"),
        (field(5, field(1, b"a") + field(5, located(b"w.bin", False))), "do not list"),
    ],
)
def test_a_node_in_another_form(refused: Callable[..., str], more: bytes, says: str) -> None:
    assert says in refused(with_node(NODE + more), files={})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (key(14, 0) + varint(1 + 2**32), "in data_location"),
        (key(14, 0) + varint(2), "in data_location"),
        (key(14, 0) + varint(1), "without a location"),
        (key(14, 0) + varint(0) + key(14, 0) + varint(1), "more than one data_location"),
        (key(2, 0) + varint(1), "more than one data_type"),
        (key(2, 0) + varint(1 + 2**40), "which has 32 bits"),
        (field(3, b""), "tensors in segments"),
        (field(9, b""), "more than one raw_data"),
        (field(5, b"\x80\x00"), "longer than it needs"),
        (field(5, b"\xff\xff\xff\xff\x0f"), "more than 32 bits"),
        (field(7, b"\xff"), "ends within a number"),
        (field(4, b"123"), "3 bytes of float_data"),
        (field(13, field(1, b"location") + field(2, b"a") * 2), "more than one value"),
        (field(13, field(1, b"basepath") + field(2, b"/")), "external data by 'basepath'"),
    ],
)
def test_a_tensor_in_another_form(refused: Callable[..., str], more: bytes, says: str) -> None:
    weights = numpy_helper.from_array(np.ones((32, 16), np.float32), "w").SerializeToString()
    assert says in refused(with_weights(weights + more))


def test_external_data_in_an_attribute_of_a_node(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    """Its bytes would be read from the path, after they were hashed."""
    data = np.ones(512, np.float32).tobytes()
    (tmp_path / "listed.bin").write_bytes(data)
    listed = {"listed.bin": hashlib.sha256(data).hexdigest()}
    value = field(1, b"value") + field(5, located(b"listed.bin", False)) + key(20, 0) + varint(4)
    node = helper.make_node("Constant", [], ["other"]).SerializeToString() + field(5, value)
    assert "do not list" in refused(with_node(node), files=listed)


def test_an_initializer_twice(refused: Callable[..., str]) -> None:
    weights = numpy_helper.from_array(np.ones((32, 16), np.float32), "w").SerializeToString()
    made = tiny.model()
    made.graph.initializer.add().ParseFromString(weights)
    assert "the initializer 'w' twice" in refused(made.SerializeToString())


def test_a_dimension_with_two_sizes(refused: Callable[..., str]) -> None:
    made = tiny.model()
    value = helper.make_tensor_value_info("other", 1, None)
    made.graph.value_info.append(value)
    size = key(1, 0) + b"\x01" + field(2, b"n")
    kind = key(1, 0) + varint(1) + field(2, field(1, size))
    both = field(1, b"x") + field(2, field(1, kind))
    graph = made.graph.SerializeToString() + field(13, both)
    assert "more than one size" in refused(without_graph() + field(7, graph))


def test_more_fields_than_a_file_may_have(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentguard.runtime import wire

    monkeypatch.setattr(wire, "MAX_FIELDS", 1000)
    made = tiny.model()
    made.graph.node[0].input.extend([""] * 1000)
    assert "more than 1,000 fields" in refused(made.SerializeToString())


# -- ONNX Runtime's own format ---------------------------------------------------------------


def polyglot() -> bytes:
    """An .onnx file that ONNX Runtime, left to itself, takes for one of its own format."""
    made = tiny.model()
    made.ClearField("producer_name")
    return field(2, b"aaORTM") + made.SerializeToString()


def test_a_file_that_onnx_runtime_takes_for_its_own_format(refused: Callable[..., str]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="ORT model"):
        onnxruntime.InferenceSession(polyglot(), options)
    assert "ONNX Runtime's own format" in refused(polyglot())


def test_a_session_reads_what_was_looked_at_as_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentguard.runtime import artifact

    monkeypatch.setattr(artifact, "_FLATBUFFER", b"none")
    path = written(tmp_path / "polyglot.onnx", polyglot())
    assert Guard(path, threads=1).scan(LATENTS)[0].error is None


# -- what errors say -------------------------------------------------------------------------


def test_an_error_of_onnx_runtime_is_whole(refused: Callable[..., str]) -> None:
    newer = tiny.model()
    newer.ir_version = 99
    text = refused(newer.SerializeToString())
    assert "Unsupported model IR version: 99, max supported IR version" in text
    assert "onnxruntime_src" not in text
    future = tiny.model()
    future.opset_import[0].version = 99
    text = refused(future.SerializeToString())
    assert "Current official support for domain ai.onnx is till opset" in text


def test_an_error_of_onnx_runtime_shows_nothing_unseen(refused: Callable[..., str]) -> None:
    made = tiny.model()
    made.graph.node[1].op_type = "Explode\x1b[2J\u202e\u3164"
    text = refused(made.SerializeToString())
    assert r"Explode\x1b[2J\u202e\u3164" in text
    assert text.isprintable()


# -- sizes that a file states ----------------------------------------------------------------


def test_a_stated_size_over_the_limit(tmp_path: Path) -> None:
    content = tiny.model(1024, 1024).SerializeToString()
    path = written(tmp_path / "large.onnx", content, height=1024, width=1024)
    with pytest.raises(ModelError, match=r"exported for 1024x1024 latent cells, over the limit"):
        Guard(path, threads=1)


def test_warming_up_costs_no_more_than_small_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentguard.runtime.network import Network

    ran: list[tuple[int, ...]] = []
    run = Network._run
    monkeypatch.setattr(Network, "_run", lambda self, x: ran.append(x.shape) or run(self, x))
    for side, cells in ((1024, []), (64, [(1, 32, 64, 64)])):
        ran.clear()
        content = tiny.model(side, side).SerializeToString()
        path = written(tmp_path / f"{side}.onnx", content, height=side, width=side)
        guard = Guard(path, threads=1, max_cells=1 << 20)
        assert ran == cells
        assert guard.scan(np.zeros((1, 32, side, side), np.float32))[0].error is None


def test_a_policy_that_does_not_fit_is_refused_without_a_run(tmp_path: Path) -> None:
    metadata = tiny.metadata(height=1024, width=1024)
    metadata["policy"]["concepts"][0]["threshold"]["kind"] = "maybe"
    path = tmp_path / "large.onnx"
    content = tiny.model(1024, 1024).SerializeToString()
    path.write_bytes(tiny.signed(content, json.dumps(metadata)))
    with pytest.raises(ModelError, match="does not fit its policy"):
        Guard(path, threads=1, max_cells=1 << 20)
    metadata["policy"]["concepts"] = [None]
    path.write_bytes(tiny.signed(content, json.dumps(metadata)))
    with pytest.raises(ModelError, match="does not fit its policy"):
        Guard(path, threads=1, max_cells=1 << 20)


def test_the_bytes_that_were_looked_at_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "tiny.onnx", tiny.model().SerializeToString())
    data = path.read_bytes()
    found = open_artifact(path)
    assert found.data == data
    assert onnx.load_from_string(found.data).SerializeToString() == data
