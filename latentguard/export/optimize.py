"""Graph simplifications for every export, in standard operators only.

Nothing here depends on a provider: what an engine fuses into operators of its own (bias and GELU,
convolution and clipping, the scale and transpose of attention) it fuses when it loads the file, as
the layout here lets it. What no engine does by itself is done here: a resize between fixed sizes
is two matrix products. Rows that nobody reads are not in the graph: `features(tokens=False)`.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

MAX_RESIZE = 1024
"""Sides above which a resize stays one: its matrices are dense."""


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """A simpler model with the same inputs, outputs, metadata and values.

    Constants are folded, batch norms go into convolutions, equal subgraphs are merged, and what no
    output needs is dropped. Values agree to float32 rounding.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import optimize_ir

    graph = ir.from_proto(model)
    optimize_ir(graph)
    common.ShapeInferencePass()(graph)
    if _matrices_for_resizes(graph):
        optimize_ir(graph)
    common.TopologicalSortPass()(graph)
    simpler: onnx.ModelProto = ir.to_proto(graph)
    # Names that the exporter left for debugging hold paths of the machine that exported.
    for node in simpler.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    del simpler.metadata_props[:]
    simpler.metadata_props.extend(model.metadata_props)
    return simpler


def _matrices_for_resizes(model: ir.Model) -> bool:
    """Replace each Resize [B, C, H, W] between fixed heights and widths by rows @ x @ columns.

    The operator is linear and treats height and width apart. ONNX Runtime interpolates cubics with
    one thread, value by value: as products the same costs a fifteenth.
    """
    found = False
    for node in list(model.graph):
        if node.domain != "" or node.op_type != "Resize" or len(node.inputs) not in (3, 4):
            continue
        value, out = node.inputs[0], node.outputs[0]
        sizes = _fixed_sizes(node)
        if sizes is None or value is None:
            continue
        (height, width), (tall, wide) = sizes
        rows = _resize_matrix(node, height, tall)
        columns = _resize_matrix(node, width, wide).T
        tape = ir.tape.Tape()
        left = tape.initializer(ir.tensor(rows.copy(), name=f"{out.name}_rows"))
        right = tape.initializer(ir.tensor(columns.copy(), name=f"{out.name}_columns"))
        result = tape.op("MatMul", [tape.op("MatMul", [left, value]), right])
        for made in tape.initializers:
            model.graph.register_initializer(made)
        model.graph.insert_before(node, tape.nodes)
        result.shape, result.type = out.shape, out.type
        ir.convenience.replace_all_uses_with(out, result)
        model.graph.remove(node, safe=True)
        found = True
    return found


def _fixed_sizes(node: ir.Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Height and width before and after, of a float32 Resize that touches nothing else."""
    value, out = node.inputs[0], node.outputs[0]
    if value is None or value.dtype != ir.DataType.FLOAT or out.is_graph_output():
        return None
    if value.shape is None or out.shape is None or (value.shape.rank(), out.shape.rank()) != (4, 4):
        return None
    mode = node.attributes.get_string("mode", "nearest")
    crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if mode not in ("linear", "cubic") or crop == "tf_crop_and_resize" or "axes" in node.attributes:
        return None
    if value.shape[:2] != out.shape[:2]:
        return None
    sides = [side for side in (*value.shape[2:], *out.shape[2:]) if isinstance(side, int)]
    if len(sides) != 4 or max(sides) > MAX_RESIZE:
        return None
    return (sides[0], sides[1]), (sides[2], sides[3])


def _resize_matrix(node: ir.Node, before: int, after: int) -> NDArray[np.float32]:
    """[after, before]: what the operator makes of unit vectors, as ONNX Runtime computes it."""
    import onnxruntime
    from onnx import helper

    unit = np.eye(before, dtype=np.float32)[None, None]
    attributes = [ir.to_proto(attribute) for attribute in node.attributes.values()]
    resize = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"])
    resize.attribute.extend(attributes)
    size = helper.make_tensor("sizes", onnx.TensorProto.INT64, [4], [1, 1, after, before])
    vectors = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, rows, before])
        for name, rows in (("x", before), ("y", after))
    ]
    graph = helper.make_graph([resize], "resize", vectors[:1], vectors[1:], [size])
    opsets = [helper.make_opsetid("", node.version or 19)]
    small = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(
        small.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    made: NDArray[np.float32] = session.run(None, {"x": unit})[0][0, 0]
    return made
