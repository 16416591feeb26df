"""Computes only the rows that are used: a selection moves up to where its rows are made.

An image's embedding is one token of many (Latent-CLIP's class token, nano's pooled row), picked at
the end: of the last block's 257 tokens 256 are dropped. A selection passes through operators that
treat rows alone, so that they see one row. The result is the same numbers, one row of each product.

Two walks: upward, from the outputs, what is needed of every value (all of it, or one index of one
axis); then downward, each operator whose result is needed in part gets its inputs in part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir


class Row(NamedTuple):
    """One index of one axis, both counted from 0."""

    axis: int
    at: int


# What is needed of a node's inputs when one row of its output is: a Row, or None for all of it.
Needs = list[Row | None]

UNARY = {
    *("Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "Gelu", "Identity", "Log", "Neg", "Relu"),
    *("Sigmoid", "Sqrt", "Tanh"),
}
BINARY = {"Add", "Div", "Mul", "Pow", "Sub"}


def narrow(model: ir.Model) -> bool:
    """Move selections of single rows (Gather of one constant index) up; whether any moved.

    Needs the shapes of values, as shape inference gives them; where one is missing nothing moves.
    """
    graph = model.graph
    needed: dict[ir.Value, Row] = {}
    through: dict[ir.Node, Needs] = {}
    for node in reversed(list(graph)):
        row = _wanted(node, needed, through)
        rule = RULES.get(node.op_type) if node.domain == "" and row is not None else None
        needs = rule(node, row) if rule is not None and row is not None else None
        if needs is not None and row is not None:
            through[node] = needs
            needed[node.outputs[0]] = row
    # Nothing is gained by a selection that only its own operator takes part in.
    if not through:
        return False
    selections = {node: row for node in graph if (row := _selection(node)) is not None}
    for node in list(graph):
        if node in through:
            _take_rows(node, needed[node.outputs[0]], through[node], needed)
        elif node in selections and needed.get(_first(node)) == selections[node]:
            node.replace_input_with(1, _constant(graph, node, np.array(0, np.int64)))
    return True


def _wanted(
    node: ir.Node, needed: dict[ir.Value, Row], through: dict[ir.Node, Needs]
) -> Row | None:
    """The one row of a node's only output that all its readers want, None for all of it."""
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output() or not node.outputs[0].uses():
        return None
    wanted: set[Row | None] = set()
    for reader, position in node.outputs[0].uses():
        if reader.graph is not node.graph:
            return None
        if reader in through:
            wanted.add(through[reader][position])
        else:
            wanted.add(_selection(reader) if position == 0 else None)
    return wanted.pop() if len(wanted) == 1 else None


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _selection(node: ir.Node) -> Row | None:
    """What a Gather with one constant scalar index selects."""
    if node.op_type != "Gather" or node.domain != "":
        return None
    index = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
    shape = _first(node).shape
    if index is None or index.shape.rank() != 0 or shape is None:
        return None
    axis = _axis(node, "axis", 0, shape.rank())
    place = int(index.numpy())
    size = shape[axis]
    if place < 0:
        if not isinstance(size, int):
            return None
        place += size
    return Row(axis, place)


def _take_rows(node: ir.Node, row: Row, needs: Needs, needed: dict[ir.Value, Row]) -> None:
    """Give a node the rows that it needs; its output has one row afterward."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if node.op_type == "Concat":
        piece = next(i for i, need in enumerate(needs) if need is not None)
        picked = _rows_of(graph, node, node.inputs[piece], needs[piece], needed)
        same = ir.Node("", "Identity", [picked], num_outputs=1)
        graph.insert_before(node, same)
        same.outputs[0].shape, same.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(same.outputs[0])
        needed[same.outputs[0]] = row
        _shorten(same.outputs[0], row)
        return
    if node.op_type == "Reshape":
        target = _constant_of(node.inputs[1]).copy()
        if target[row.axis] != 0:
            target[row.axis] = 1
        node.replace_input_with(1, _constant(graph, node, target))
    for position, need in enumerate(needs):
        if need is not None:
            picked = _rows_of(graph, node, node.inputs[position], need, needed)
            node.replace_input_with(position, picked)
    _shorten(node.outputs[0], row)


def _rows_of(
    graph: ir.Graph,
    node: ir.Node,
    value: ir.Value | None,
    need: Row | None,
    needed: dict[ir.Value, Row],
) -> ir.Value:
    """A value that has the needed row only: itself where it was made so, else a slice of it."""
    assert value is not None
    assert need is not None
    whole = value.shape is not None and value.shape[need.axis] == 1
    if whole or needed.get(value) == need:
        return value
    ends = (need.at, need.at + 1, need.axis)
    bounds = [_constant(graph, node, np.array([end], np.int64)) for end in ends]
    cut = ir.Node("", "Slice", [value, *bounds], num_outputs=1)
    graph.insert_before(node, cut)
    cut.outputs[0].shape, cut.outputs[0].type = value.shape, value.type
    _shorten(cut.outputs[0], need)
    return cut.outputs[0]


def _shorten(value: ir.Value, row: Row) -> None:
    if value.shape is not None:
        sizes = list(value.shape)
        sizes[row.axis] = 1
        value.shape = ir.Shape(sizes)


def _constant(graph: ir.Graph, node: ir.Node, array: np.ndarray) -> ir.Value:
    made = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))], num_outputs=1)
    graph.insert_before(node, made)
    made.outputs[0].shape = ir.Shape(array.shape)
    made.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    made.outputs[0].const_value = ir.tensor(array)
    return made.outputs[0]


def _constant_of(value: ir.Value | None) -> np.ndarray:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    assert tensor is not None
    return tensor.numpy()


# --- how operators pass a row on; None where they do not ------------------------------------------


def _axis(node: ir.Node, name: str, default: int, rank: int) -> int:
    found = node.attributes.get_int(name, default)
    return found + rank if found < 0 else found


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else value.shape.rank()


def _alone(count: int, row: Row) -> Needs:
    """The first input in part, the others whole."""
    return [row, *[None] * (count - 1)]


def _unary(node: ir.Node, row: Row) -> Needs | None:
    return _alone(len(node.inputs), row)


def _broadcast(value: ir.Value | None, row: Row, rank: int) -> Row | bool | None:
    """The row of an operand that broadcasts to `rank`; None: all of it; False: cannot tell."""
    own = _rank(value)
    if own is None or value is None or value.shape is None:
        return False
    axis = row.axis - (rank - own)
    if axis < 0 or value.shape[axis] == 1:
        return None
    if not isinstance(value.shape[axis], int):
        return False
    return Row(axis, row.at)


def _binary(node: ir.Node, row: Row) -> Needs | None:
    rank = _rank(node.outputs[0])
    if rank is None:
        return None
    needs: Needs = []
    for value in node.inputs:
        need = _broadcast(value, row, rank)
        if isinstance(need, bool):
            return None
        needs.append(need)
    return needs


def _matmul(node: ir.Node, row: Row) -> Needs | None:
    left, right, rank = _rank(node.inputs[0]), _rank(node.inputs[1]), _rank(node.outputs[0])
    if left is None or right is None or rank is None or min(left, right) < 2:
        return None
    if row.axis == rank - 2:
        return [Row(left - 2, row.at), None]
    return None


def _softmax(node: ir.Node, row: Row) -> Needs | None:
    rank = _rank(node.inputs[0])
    if rank is None or row.axis == _axis(node, "axis", -1, rank):
        return None
    return [row]


def _layer_norm(node: ir.Node, row: Row) -> Needs | None:
    rank = _rank(node.inputs[0])
    if rank is None or row.axis >= _axis(node, "axis", -1, rank):
        return None
    return _alone(len(node.inputs), row)


def _transpose(node: ir.Node, row: Row) -> Needs | None:
    order = node.attributes.get_ints("perm", None)
    return None if order is None else [Row(order[row.axis], row.at)]


def _squeeze(node: ir.Node, row: Row) -> Needs | None:
    rank = _rank(node.inputs[0])
    if rank is None or len(node.inputs) < 2 or _not_constant(node.inputs[1]):
        return None
    gone = {int(axis) % rank for axis in _constant_of(node.inputs[1])}
    kept = [axis for axis in range(rank) if axis not in gone]
    return _alone(2, Row(kept[row.axis], row.at))


def _slice(node: ir.Node, row: Row) -> Needs | None:
    rank = _rank(node.inputs[0])
    if rank is None or len(node.inputs) < 4 or _not_constant(node.inputs[3]):
        return None
    if row.axis in {int(axis) % rank for axis in _constant_of(node.inputs[3])}:
        return None
    return _alone(len(node.inputs), row)


def _pad(node: ir.Node, row: Row) -> Needs | None:
    rank = _rank(node.inputs[0])
    if rank is None or len(node.inputs) > 3 or _not_constant(node.inputs[1]):
        return None
    amounts = _constant_of(node.inputs[1])
    if amounts[row.axis] or amounts[rank + row.axis]:
        return None
    return _alone(len(node.inputs), row)


def _concat(node: ir.Node, row: Row) -> Needs | None:
    rank = _rank(node.outputs[0])
    if rank is None or row.axis != _axis(node, "axis", 0, rank):
        return None
    start = 0
    for position, value in enumerate(node.inputs):
        size = value.shape[row.axis] if value is not None and value.shape is not None else None
        if not isinstance(size, int):
            return None
        if start <= row.at < start + size:
            needs: Needs = [None] * len(node.inputs)
            needs[position] = Row(row.axis, row.at - start)
            return needs
        start += size
    return None


def _reshape(node: ir.Node, row: Row) -> Needs | None:
    before, after = _first(node).shape, node.outputs[0].shape
    if before is None or after is None or _not_constant(node.inputs[1]):
        return None
    leading = row.axis + 1
    if min(before.rank(), after.rank()) < leading or before[:leading] != after[:leading]:
        return None
    if None in [getattr(size, "value", size) for size in before[:leading]]:
        return None
    # -1 on the axis itself would be counted from what is left.
    if _constant_of(node.inputs[1])[row.axis] == -1:
        return None
    return _alone(2, row)


def _not_constant(value: ir.Value | None) -> bool:
    return value is None or ir.convenience.get_const_tensor(value) is None


RULES: dict[str, Callable[[ir.Node, Row], Needs | None]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BINARY, _binary),
    "Concat": _concat,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
}
