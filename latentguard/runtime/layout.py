"""The messages of an .onnx file, as far as an export has them.

(Names and numbers of the fields: onnx.proto of the ONNX specification.)
"""

from __future__ import annotations

from latentguard.runtime.wire import Kind, Layout, Spec


def _one(name: str, kind: Kind, values: range | None = None) -> Spec:
    return Spec(name, kind, values=values)


def _many(name: str, kind: Kind) -> Spec:
    return Spec(name, kind, repeated=True)


def _packed(name: str, kind: Kind) -> Spec:
    return Spec(name, kind, packed=True)


def _message(name: str, of: Layout) -> Spec:
    return Spec(name, of=of)


def _messages(name: str, of: Layout) -> Spec:
    return Spec(name, of=of, repeated=True)


def _refused(name: str, what: str) -> Spec:
    return Spec(name, refused=what)


_BRANCH = "a graph within its graph (a loop or a branch)"
_FUNCTIONS = "functions or training data"
_SPARSE = "sparse tensors"
_KINDS = "values that are no tensors"

ENTRY = Layout("StringStringEntryProto", {1: _one("key", "string"), 2: _one("value", "string")})

OPERATOR_SET = Layout(
    "OperatorSetIdProto", {1: _one("domain", "string"), 2: _one("version", "int64")}
)

TENSOR = Layout(
    "TensorProto",
    {
        1: _many("dims", "int64"),
        2: _one("data_type", "int32"),
        3: _refused("segment", "tensors in segments"),
        4: _packed("float_data", "float"),
        5: _packed("int32_data", "int32"),
        6: _many("string_data", "bytes"),
        7: _packed("int64_data", "int64"),
        8: _one("name", "string"),
        9: _one("raw_data", "bytes"),
        10: _packed("double_data", "double"),
        11: _packed("uint64_data", "uint64"),
        12: _one("doc_string", "string"),
        13: _messages("external_data", ENTRY),
        14: _one("data_location", "int32", range(2)),
        16: _messages("metadata_props", ENTRY),
    },
)

_DIMENSION = Layout(
    "TensorShapeProto.Dimension",
    {
        1: Spec("dim_value", "int64", choice="size"),
        2: Spec("dim_param", "string", choice="size"),
        3: _one("denotation", "string"),
    },
)
_SHAPE = Layout("TensorShapeProto", {1: _messages("dim", _DIMENSION)})
_TENSOR_TYPE = Layout(
    "TypeProto.Tensor", {1: _one("elem_type", "int32"), 2: _message("shape", _SHAPE)}
)
_TYPE = Layout(
    "TypeProto",
    {
        1: _message("tensor_type", _TENSOR_TYPE),
        4: _refused("sequence_type", _KINDS),
        5: _refused("map_type", _KINDS),
        6: _one("denotation", "string"),
        7: _refused("opaque_type", _KINDS),
        8: _refused("sparse_tensor_type", _SPARSE),
        9: _refused("optional_type", _KINDS),
    },
)

VALUE = Layout(
    "ValueInfoProto",
    {
        1: _one("name", "string"),
        2: _message("type", _TYPE),
        3: _one("doc_string", "string"),
        4: _messages("metadata_props", ENTRY),
    },
)

ATTRIBUTE = Layout(
    "AttributeProto",
    {
        1: _one("name", "string"),
        2: _one("f", "float"),
        3: _one("i", "int64"),
        4: _one("s", "bytes"),
        5: _message("t", TENSOR),
        6: _refused("g", _BRANCH),
        7: _many("floats", "float"),
        8: _many("ints", "int64"),
        9: _many("strings", "bytes"),
        10: _messages("tensors", TENSOR),
        11: _refused("graphs", _BRANCH),
        13: _one("doc_string", "string"),
        14: _refused("tp", _KINDS),
        15: _refused("type_protos", _KINDS),
        20: _one("type", "int32", range(15)),
        21: _refused("ref_attr_name", _FUNCTIONS),
        22: _refused("sparse_tensor", _SPARSE),
        23: _refused("sparse_tensors", _SPARSE),
    },
)

NODE = Layout(
    "NodeProto",
    {
        1: _many("input", "string"),
        2: _many("output", "string"),
        3: _one("name", "string"),
        4: _one("op_type", "string"),
        5: _messages("attribute", ATTRIBUTE),
        6: _one("doc_string", "string"),
        7: _one("domain", "string"),
        8: _one("overload", "string"),
        9: _messages("metadata_props", ENTRY),
        10: _refused("device_configurations", "operators that are spread over devices"),
    },
)

GRAPH = Layout(
    "GraphProto",
    {
        1: _messages("node", NODE),
        2: _one("name", "string"),
        5: _messages("initializer", TENSOR),
        10: _one("doc_string", "string"),
        11: _messages("input", VALUE),
        12: _messages("output", VALUE),
        13: _messages("value_info", VALUE),
        14: _refused("quantization_annotation", "annotations of a quantization"),
        15: _refused("sparse_initializer", _SPARSE),
        16: _messages("metadata_props", ENTRY),
    },
)

MODEL = Layout(
    "ModelProto",
    {
        1: _one("ir_version", "int64"),
        2: _one("producer_name", "string"),
        3: _one("producer_version", "string"),
        4: _one("domain", "string"),
        5: _one("model_version", "int64"),
        6: _one("doc_string", "string"),
        7: _message("graph", GRAPH),
        8: _messages("opset_import", OPERATOR_SET),
        14: _messages("metadata_props", ENTRY),
        20: _refused("training_info", _FUNCTIONS),
        25: _refused("functions", _FUNCTIONS),
        26: _refused("configuration", "operators that are spread over devices"),
    },
)
