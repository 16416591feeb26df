"""8-bit weights: within what a CPU without VNNI adds in 16 bits, and nearer than plain rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from latentguard.export.matrices import observe, replace
from latentguard.export.quantize import convert
from latentguard.export.rounding import PAIR, column_scales, compensated, to_nearest

Array = NDArray[np.float32]


def matrix(rows: int, columns: int, seed: int = 0, heavy: bool = False) -> Array:
    """Normal, or with the long tails that make scales coarse."""
    random = np.random.default_rng(seed)
    drawn = random.standard_t(2, (rows, columns)) if heavy else random.normal(size=(rows, columns))
    return drawn.astype(np.float32)


def largest_pair(steps: NDArray[np.int8]) -> int:
    """The largest sum that two neighbors in a column add to with activations of 255."""
    wide = np.vstack([steps, np.zeros((len(steps) % 2, steps.shape[1]), np.int8)]).astype(int)
    pairs = wide.reshape(-1, 2, steps.shape[1])
    return int(max(np.maximum(pairs, 0).sum(1).max(), np.maximum(-pairs, 0).sum(1).max()))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    factor=st.sampled_from([1e-8, 1.0, 1e6]),
    heavy=st.booleans(),
)
def test_no_pair_of_weights_can_saturate(
    rows: int, columns: int, seed: int, factor: float, heavy: bool
) -> None:
    weight = matrix(rows, columns, seed, heavy) * np.float32(factor)
    scales = column_scales(weight)
    inputs = matrix(50, rows, seed + 1)
    for steps in (to_nearest(weight, scales), compensated(weight, scales, inputs.T @ inputs)):
        assert steps.dtype == np.int8
        assert largest_pair(steps) <= PAIR
        assert PAIR * 255 <= 2**15 - 1


def test_each_weight_is_within_half_a_step() -> None:
    weight = matrix(64, 32, heavy=True)
    scales = column_scales(weight)
    error = np.abs(to_nearest(weight, scales) * scales - weight)
    # A step more where both of a pair were rounded up.
    assert (error <= 0.5 * scales * (1 + 1e-5)).mean() > 0.999
    assert (error <= 1.5 * scales).all()


def test_scales_are_finer_than_seven_bits() -> None:
    weight = matrix(768, 64)
    seven_bits = np.abs(weight).max(0) / 63
    assert (column_scales(weight) / seven_bits).mean() < 0.85


def test_rounding_makes_up_for_itself_on_what_it_was_shown() -> None:
    weight = matrix(96, 48)
    # Correlated inputs, as activations are.
    inputs = matrix(400, 24, 1) @ matrix(24, 96, 2) + 0.1 * matrix(400, 96, 3)
    scales = column_scales(weight)
    wanted = inputs @ weight
    plain = np.square(inputs @ (to_nearest(weight, scales) * scales) - wanted).mean()
    steps = compensated(weight, scales, inputs.T @ inputs)
    made_up = np.square(inputs @ (steps * scales) - wanted).mean()
    assert made_up < 0.5 * plain


@pytest.mark.parametrize("moment", [np.zeros((7, 7)), np.full((7, 7), np.nan)])
def test_inputs_that_tell_nothing_give_plain_rounding(moment: Array) -> None:
    weight = matrix(7, 5)
    scales = column_scales(weight)
    assert np.array_equal(compensated(weight, scales, moment), to_nearest(weight, scales))


def test_a_column_of_zeros() -> None:
    weight = matrix(6, 3)
    weight[:, 1] = 0
    scales = column_scales(weight)
    assert (scales > 0).all()
    assert (to_nearest(weight, scales)[:, 1] == 0).all()


# --- whole products --------------------------------------------------------------------------


def product(weight: Array) -> onnx.ModelProto:
    """y = x @ weight."""
    rows, columns = weight.shape
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("x", rows), ("y", columns))
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph(
        [node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")]
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def run(model: onnx.ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: Array = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_product_is_what_the_integers_say(dynamic: bool, tmp_path: Path) -> None:
    """This machine's kernel adds without saturation what the rounded numbers are."""
    weight = matrix(256, 64, heavy=True)
    x = np.abs(matrix(32, 256, 5)) * 3  # one sign: sums grow as large as they can
    model = product(weight)
    onnx.save(model, tmp_path / "a.onnx")
    seen = observe(tmp_path / "a.onnx", ["x"], [{"x": x}])
    replace(model, ["product"], seen, dynamic)
    parts = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    step = np.float32(x.max() / 255)
    levels = np.clip(np.round(x / step), 0, 255)
    exact = (levels @ parts["w_8bit"].astype(np.float64)) * step * parts["w_scale"]
    found = run(model, x)
    # Saturation costs whole percents of the sums; a level that rounds the other way almost nothing.
    assert np.abs(found - exact).max() < 2e-3 * np.abs(exact).max()


def test_calibration_sees_all_images(tmp_path: Path) -> None:
    onnx.save(product(matrix(8, 4)), tmp_path / "a.onnx")
    batches = [{"x": matrix(3, 8, 1)}, {"x": matrix(2, 8, 2) * 10}]
    seen = observe(tmp_path / "a.onnx", ["x"], batches)["x"]
    rows = np.concatenate([batch["x"] for batch in batches])
    assert seen.least == pytest.approx(float(rows.min()))
    assert seen.most == pytest.approx(float(rows.max()))
    np.testing.assert_allclose(seen.moment, rows.T @ rows, rtol=1e-5)


def test_a_bank_and_all_that_depends_on_it_stay_float(tmp_path: Path) -> None:
    bank = helper.make_tensor_value_info("bank", onnx.TensorProto.FLOAT, ["p", 16])
    model = product(matrix(32, 16))
    model.graph.input.append(bank)
    nodes = [
        helper.make_node("Transpose", ["bank"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["y", "turned"], ["scores"], "compare"),
    ]
    model.graph.node.extend(nodes)
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", "p"])
    )
    onnx.save(model, tmp_path / "a.onnx")
    batch = {"x": matrix(8, 32, 1), "bank": matrix(5, 16, 2)}
    for precision in ("int8", "int8-dynamic", "fp16"):
        convert(tmp_path / "a.onnx", tmp_path / "b.onnx", precision, [batch], keep=["bank"])
        made = onnx.load(tmp_path / "b.onnx")
        onnx.checker.check_model(made, full_check=True)
        kinds = [node.op_type for node in made.graph.node]
        assert kinds.count("MatMul") + kinds.count("MatMulInteger") == 2
        (compare,) = (node for node in made.graph.node if node.name == "compare")
        assert compare.op_type == "MatMul"
        session = onnxruntime.InferenceSession(
            made.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        found = session.run(None, batch)[0]
        wanted = batch["x"] @ matrix(32, 16) @ batch["bank"].T
        assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
