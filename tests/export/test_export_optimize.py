"""Simplified graphs give the same numbers, and exports compute what is read alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from latentguard.export import Exported
from latentguard.export.optimize import optimize

FLOAT = onnx.TensorProto.FLOAT


def model(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int | str], **constants: NDArray[np.generic]
) -> onnx.ModelProto:
    """From the input x to the output y."""
    x = helper.make_tensor_value_info("x", FLOAT, shape)
    y = helper.make_tensor_value_info("y", FLOAT, None)
    initial = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(what: onnx.ModelProto, x: NDArray[np.float32], *more: str) -> list[NDArray[np.float32]]:
    copy = onnx.ModelProto()
    copy.CopyFrom(what)
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in more)
    session = onnxruntime.InferenceSession(
        copy.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: list[NDArray[np.float32]] = session.run(None, {"x": x})
    return result


RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize(("before", "after"), [((12, 10), (24, 25)), ((24, 20), (12, 9))])
@pytest.mark.parametrize("antialias", [0, 1])
def test_a_resize_is_two_products(
    mode: str, before: tuple[int, int], after: tuple[int, int], antialias: int
) -> None:
    sizes = np.array([1, 3, *after])
    nodes = [
        helper.make_node("Resize", ["x", "", "", "sizes"], ["r"], mode=mode, antialias=antialias),
        helper.make_node("Relu", ["r"], ["y"]),
    ]
    plain = model(nodes, [1, 3, *before], sizes=sizes)
    simpler = optimize(plain)
    assert [node.op_type for node in simpler.graph.node] == ["MatMul", "MatMul", "Relu"]
    x = RANDOM.normal(size=(1, 3, *before)).astype(np.float32)
    # Rounding alone; worst seen 5e-7.
    np.testing.assert_allclose(run(simpler, x)[0], run(plain, x)[0], atol=1e-5)


def test_the_last_block_of_latent_clip_reads_one_token(
    exports: Callable[[str], Exported],
) -> None:
    """Without heat maps nobody reads the patches' tokens behind the last attention."""
    found = onnx.load(exports("clip").path)
    given = RANDOM.normal(size=(2, 4, 64, 64)).astype(np.float32)
    known = {tensor.name for tensor in found.graph.initializer}
    names = [
        node.output[0]
        for node in found.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in known
    ]
    del found.graph.output[:]
    found.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(
        found.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = session.run(None, {"latents": given})
    # Of each block in and out of attention, up, and down; the last has no more than its keys and
    # values of all 65 tokens.
    rows = [value.size // value.shape[-1] // 2 for value in values]
    assert rows.count(65) <= 6
    assert rows.count(1) >= 3


def loaded(path: Path, folder: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a file on the CPU."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    options.log_severity_level = 3  # that such a file is for this machine
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "loaded.onnx").graph.node]


@pytest.mark.parametrize("name", ["clip", "clip-int8"])
def test_the_engine_knows_gelu_when_it_loads_a_file(
    name: str, exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    kinds = loaded(exports(name).path, tmp_path)
    assert sum(kind.endswith("Gelu") for kind in kinds) == 2
    assert "Erf" not in kinds


def test_what_depends_on_the_bank_alone_is_computed_when_a_file_is_loaded(
    exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    kinds = loaded(exports("nano").path, tmp_path)
    assert not {"Range", "Less", "GreaterOrEqual", "Or"}.intersection(kinds)
