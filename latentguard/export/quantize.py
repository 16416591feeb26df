"""From a float32 .onnx file to a float16 or 8-bit one, in standard operators.

Three kinds of nodes become 8-bit: convolutions (with int8 only), the clips and additions between
them, and products with constant matrices. Attention's own products, normalizations and the
comparison with the concepts stay float32: they cost little, and small differences decide there.

A CPU without VNNI adds two 8-bit products in 16 bits, which may saturate. So the weights of
convolutions keep to 7 bits (`reduce_range`), and those of products get scales that rule saturation
out (rounding.py). In ONNX Runtime's dynamic quantization of B/4-plus, saturation was the difference
between cosines of 0.993 and 0.9998.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import onnx
import onnx_ir as ir

from latentguard.errors import ModelError
from latentguard.export.matrices import Batch, observe, replace

Precision = Literal["fp16", "int8", "int8-dynamic"]

# From these operators on everything stays float32: values leave the range of half precision (sums
# of squares), or small differences decide.
COMPARISON = ("ReduceL2", "ReduceSumSquare", "LpNormalization", "LogSoftmax")
CLIPS = ("Clip", "Relu")


def convert(
    source: Path,
    target: Path,
    precision: Precision,
    batches: Iterable[Batch] | None = None,
    *,
    keep: Collection[str] = (),
) -> None:
    """Write `source` (float32) as `target` in another precision; the metadata is kept.

    Args:
        source: a float32 .onnx file, with its external data next to it if it has some.
        target: the file to write; it holds the weights itself.
        precision: fp16 keeps inputs and outputs in float32. int8 has fixed ranges of activations,
            calibrated on `batches`. int8-dynamic takes the ranges from each input, and leaves
            convolutions in float32.
        batches: inputs by name, which int8 needs: images like those that the model will read, but
            not those on which the result is measured. 32 to 256 images are enough.
        keep: names of initializers or inputs (a concept bank) that stay float32, together with
            everything that is computed from them.

    Raises:
        ModelError: int8 without batches, an unknown precision, or nothing to quantize.
    """
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ModelError(f"precision must be one of {known}, got {precision!r}")
    model = onnx.load(source)
    metadata = list(model.metadata_props)
    names = [node.name for node in model.graph.node]
    if "" in names or len(set(names)) != len(names):
        for number, node in enumerate(model.graph.node):
            node.name = f"{node.op_type}_{number}"
    chosen = _choose(model.graph, {*keep})
    with tempfile.TemporaryDirectory() as folder:
        if precision == "fp16":
            converted = _half(model, chosen.compared)
        else:
            converted = _integer(model, Path(folder), chosen, precision, batches)
    _keep_standard(converted)
    del converted.metadata_props[:]
    converted.metadata_props.extend(metadata)
    onnx.save(converted, target)


class _Choice(NamedTuple):
    """Names of nodes, by what happens to the nodes."""

    products: list[str]
    """MatMuls of activations with a constant matrix."""
    convolutions: list[str]
    """Convolutions, the clips after them and the additions that join two of them."""
    compared: list[str]
    """Nodes that depend on `keep` or on an operator of COMPARISON, and these operators."""


def _choose(graph: onnx.GraphProto, keep: set[str]) -> _Choice:
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {n.output[0] for n in graph.node if n.op_type == "Constant"}
    products: list[str] = []
    convolutions: list[str] = []
    compared: list[str] = []
    after: set[str] = set(keep)  # values that stay float32
    integer: set[str] = set()  # values of quantized convolutions
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type in COMPARISON or after.intersection(node.input):
            after.update(node.output)
            compared.append(node.name)
            continue
        if node.op_type == "MatMul" and node.input[1] in constants - keep:
            if node.input[0] not in constants:
                products.append(node.name)
            continue
        joined = {name for name in node.input if name in integer}
        if (
            (node.op_type == "Conv" and node.input[1] in constants)
            or (node.op_type == "Add" and len(joined) == 2)
            # A clip that is the only reader of a convolution becomes part of its rounding.
            or (node.op_type in CLIPS and joined and readers[node.input[0]] == 1)
        ):
            convolutions.append(node.name)
            integer.update(set(node.output) - outputs)
    return _Choice(products, convolutions, compared)


class _Batches:
    """Calibration inputs as onnxruntime's quantizer reads them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Batch | None:
        return next(self._batches, None)


def _integer(
    model: onnx.ModelProto,
    folder: Path,
    chosen: _Choice,
    precision: Precision,
    batches: Iterable[Batch] | None,
) -> onnx.ModelProto:
    dynamic = precision == "int8-dynamic"
    if batches is None and not dynamic:
        raise ModelError(
            "precision int8 needs calibration inputs: give batches of latents, or use int8-dynamic"
        )
    if not chosen.products and (dynamic or not chosen.convolutions):
        raise ModelError("the model has no constant matrix or convolution to make 8-bit")
    path = folder / "model.onnx"
    onnx.save(model, path)
    inputs = list(batches or [])
    by_name = {node.name: node for node in model.graph.node}
    watched = list(dict.fromkeys(by_name[name].input[0] for name in chosen.products))
    seen = observe(path, watched, inputs) if inputs and watched else {}
    if chosen.convolutions and not dynamic:
        model = _convolutions(path, chosen.convolutions, inputs)
    replace(model, chosen.products, seen, dynamic)
    return model


def _convolutions(path: Path, nodes: list[str], batches: list[Batch]) -> onnx.ModelProto:
    from onnxruntime import quantization

    written = path.with_name("convolutions.onnx")
    quantization.quantize_static(
        path,
        written,
        _Batches(batches),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Add", *CLIPS],
        nodes_to_quantize=nodes,
        per_channel=True,
        reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )
    return onnx.load(written)


def _half(model: onnx.ModelProto, compared: list[str]) -> onnx.ModelProto:
    from onnxruntime.transformers import float16

    half = float16.convert_float_to_float16(
        model, keep_io_types=True, node_block_list=compared, disable_shape_infer=False
    )
    return _without_detours(half)


def _without_detours(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove casts of float32 values to half precision and back.

    The converter puts such casts between every two nodes that it leaves in float32, and a margin
    would keep only three digits. It also writes nodes in an order that the standard forbids.
    """
    from onnx_ir.passes import common

    graph = ir.from_proto(model)
    for node in graph.graph:
        back = _cast_input(node, ir.DataType.FLOAT)
        there = back.producer() if back is not None else None
        first = _cast_input(there, ir.DataType.FLOAT16) if there is not None else None
        if first is None or first.dtype != ir.DataType.FLOAT:
            continue
        out = node.outputs[0]
        if out.is_graph_output():
            first.name, out.name = out.name, first.name
        ir.convenience.replace_all_uses_with(out, first, replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(graph)
    common.TopologicalSortPass()(graph)
    straight: onnx.ModelProto = ir.to_proto(graph)
    # The types that the converter notes for intermediate values are partly wrong, and not needed.
    del straight.graph.value_info[:]
    return straight


def _cast_input(node: ir.Node, to: ir.DataType) -> ir.Value | None:
    """The value that a node casts to the type `to`; None if the node is not such a cast."""
    if node.op_type != "Cast" or node.domain != "" or node.attributes.get_int("to") != to:
        return None
    return node.inputs[0]


def _keep_standard(model: onnx.ModelProto) -> None:
    """Drop imports of operator sets that no node uses."""
    used = {node.domain for node in model.graph.node}
    for opset in list(model.opset_import):
        if opset.domain not in ("", "ai.onnx") and opset.domain not in used:
            model.opset_import.remove(opset)
