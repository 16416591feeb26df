"""8-bit products with constant matrices, in standard operators that engines know how to fuse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from latentguard.export.rounding import column_scales, compensated, to_nearest

Batch = dict[str, NDArray[Any]]


@dataclass
class Seen:
    """What calibration saw of one activation."""

    least: float = 0.0
    most: float = 0.0
    moment: NDArray[np.float32] | float = 0.0
    """Sum of outer products [K, K] of its rows."""


def observe(path: Path, names: Sequence[str], batches: Iterable[Batch]) -> dict[str, Seen]:
    """Run a model on batches, an image at a time, and watch the activations called `names`.

    The first input of a batch has the images; others (a concept bank) are given whole.
    """
    import onnxruntime

    model = onnx.load(path, load_external_data=False)
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in names if name not in known
    )
    # Beside the original, whose external data it may refer to.
    watched = path.with_name("watched.onnx")
    onnx.save(model, watched)
    session = onnxruntime.InferenceSession(watched, providers=["CPUExecutionProvider"])
    seen = {name: Seen() for name in names}
    for batch in batches:
        images = next(iter(batch))
        for image in range(len(batch[images])):
            feed = {**batch, images: batch[images][image : image + 1]}
            for name, value in zip(names, session.run(list(names), feed), strict=True):
                rows = value.reshape(-1, value.shape[-1])
                one = seen[name]
                one.least = min(one.least, float(rows.min()))
                one.most = max(one.most, float(rows.max()))
                one.moment = one.moment + rows.T @ rows
    return seen


def replace(
    model: onnx.ModelProto, products: Sequence[str], seen: dict[str, Seen], dynamic: bool
) -> None:
    """Make the MatMul nodes called `products` 8-bit, in place.

    Args:
        products: names of MatMuls whose second input is an initializer.
        seen: of their first inputs; with it weights are rounded by what they multiply, and without
            `dynamic` it gives the ranges.
        dynamic: ranges of activations from each input instead.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    chosen = set(products)
    nodes: list[onnx.NodeProto] = []
    made: dict[str, onnx.TensorProto] = {}
    quantized: set[str] = set()
    for node in graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        value, name = node.input
        scale, integer = f"{name}_scale", f"{name}_8bit"
        if integer not in made:
            weight = numpy_helper.to_array(weights[name])
            scales = column_scales(weight)
            if value in seen:
                steps = compensated(weight, scales, np.asarray(seen[value].moment))
            else:
                steps = to_nearest(weight, scales)
            zeros = np.zeros(weight.shape[1], np.int8)
            for array, called in (
                (steps, integer),
                (scales, scale),
                (zeros, f"{name}_zero"),
            ):
                made[called] = numpy_helper.from_array(array, called)
        if value not in quantized:
            quantized.add(value)
            nodes.extend(_activation(value, None if dynamic else seen[value], made))
        nodes.extend(_product(node, dynamic))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(made.values())
    read = {name for node in nodes for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


def _activation(
    value: str, seen: Seen | None, made: dict[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """An activation in 8 bits: ranges from `seen`, or from itself."""
    scale, zero = f"{value}_scale", f"{value}_zero"
    if seen is None:
        outputs = [f"{value}_8bit", scale, zero]
        return [helper.make_node("DynamicQuantizeLinear", [value], outputs, f"{value}_quantize")]
    step = np.float32(max(seen.most - seen.least, 1e-6) / 255)
    made[scale] = numpy_helper.from_array(np.array(step), scale)
    origin = np.clip(round(-seen.least / float(step)), 0, 255)
    made[zero] = numpy_helper.from_array(np.array(origin, np.uint8), zero)
    return [
        helper.make_node(
            "QuantizeLinear", [value, scale, zero], [f"{value}_8bit"], f"{value}_quantize"
        ),
        helper.make_node(
            "DequantizeLinear",
            [f"{value}_8bit", scale, zero],
            [f"{value}_restored"],
            f"{value}_restore",
        ),
    ]


def _product(node: onnx.NodeProto, dynamic: bool) -> list[onnx.NodeProto]:
    value, name = node.input
    out, title = node.output[0], node.name
    if not dynamic:
        weight = f"{out}_weight"
        inputs = [f"{name}_8bit", f"{name}_scale", f"{name}_zero"]
        return [
            helper.make_node("DequantizeLinear", inputs, [weight], f"{title}_weight", axis=1),
            helper.make_node("MatMul", [f"{value}_restored", weight], [out], title),
        ]
    # The order in which ONNX Runtime knows to fuse it with the quantization before and the bias
    # behind (DynamicQuantizeMatMul).
    inputs = [f"{value}_8bit", f"{name}_8bit", f"{value}_zero", f"{name}_zero"]
    whole, real, both = f"{out}_integer", f"{out}_cast", f"{out}_scale"
    return [
        helper.make_node("MatMulInteger", inputs, [whole], f"{title}_integer"),
        helper.make_node("Cast", [whole], [real], f"{title}_cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{value}_scale", f"{name}_scale"], [both], f"{title}_scale"),
        helper.make_node("Mul", [real, both], [out], title),
    ]
