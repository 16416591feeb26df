"""An export that is small enough to be written by hand, and the bytes of protocol buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from latentguard.policy import parse_policy
from latentguard.runtime.artifact import DIGEST, METADATA, inner_digest

POLICY = b"""
schema_version: 1
name: tiny
version: "1"
concepts:
  - id: guns
    category: weapons
    prompts: [revolver]
    contrast: [dog]
    threshold: {probability: 0.5}
    action: block
"""
CHANNELS, DIM = 32, 16


def metadata(**changes: Any) -> dict[str, Any]:
    """What stands in a file of `graph`."""
    found = {
        "schema_version": 1,
        "policy": parse_policy(POLICY, "tiny.yaml").to_dict(),
        "prompts": ["revolver"],
        "covered": [True],
        "model": {"name": "tiny", "sha256": "0" * 64},
        "space": "flux2",
        "scaled": True,
        "channels": CHANNELS,
        "packed_patch": 2,
        "dim": DIM,
        "logit_scale": 10.0,
        "precision": "fp32",
        "height": None,
        "width": None,
        "files": {},
    }
    return found | changes


def model(height: int | str = "h", width: int | str = "w") -> onnx.ModelProto:
    """Channel means, times a matrix `w`, are the embedding; its first number is the margin."""
    weights = np.random.default_rng(0).standard_normal((CHANNELS, DIM)).astype(np.float32)
    constants = {
        "w": weights,
        "sides": np.array([2, 3], np.int64),
        "one": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
        "bank.embeddings": weights[:1],
        "bank.segments": np.array([[0, 1]], np.int64),
        "bank.contrast": weights[1:2],
        "bank.contrast_segments": np.array([[0, 1]], np.int64),
    }
    nodes = [
        helper.make_node("ReduceMean", ["latents", "sides"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "w"], ["embedding"]),
        helper.make_node("Slice", ["embedding", "zero", "one", "one"], ["margin"]),
        helper.make_node("Sigmoid", ["margin"], ["probability"]),
        helper.make_node("Mul", ["margin", "nothing"], ["zeros"]),
        helper.make_node("Cast", ["zeros"], ["best_prompt"], to=TensorProto.INT64),
    ]
    constants["nothing"] = np.zeros(1, np.float32)
    outputs = [("margin", 1, 1), ("probability", 1, 1), ("best_prompt", 7, 1), ("embedding", 1, 16)]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("latents", 1, ["b", CHANNELS, height, width])],
        [helper.make_tensor_value_info(name, kind, ["b", size]) for name, kind, size in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    return made


def varint(number: int, padding: int = 0) -> bytes:
    """A number in seven bits a byte; `padding` adds bytes that it does not need."""
    groups = [number & 0x7F]
    while number := number >> 7:
        groups.append(number & 0x7F)
    groups += [0] * padding
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def key(number: int, wire: int = 2, wide: bool = False) -> bytes:
    """A field's tag. A wide one has a bit that readers of 32 bits do not see."""
    return varint(number << 3 | wire | (wide and 1 << 32))


def field(number: int, body: bytes, wide: bool = False) -> bytes:
    """A field of bytes, text or a message."""
    return key(number, wide=wide) + varint(len(body)) + body


def entry(name: str, value: str) -> bytes:
    """The bytes of a metadata entry of a model."""
    return field(14, field(1, name.encode()) + field(2, value.encode()))


def signed(content: bytes, text: str) -> bytes:
    """A file of these top-level fields, by somebody who computes its inner digest.

    text: the metadata.
    """
    content += entry(METADATA, text)
    return content + entry(DIGEST, _digest(content))


def _digest(content: bytes) -> str:
    try:
        return inner_digest(content)
    except ValueError:  # it refuses the content, whose digest does not matter then
        return "0" * 64
