"""Graph simplifications for every export, in standard operators only.

Nothing here depends on a provider: what an engine fuses into operators of its own it fuses when it
loads the file.
"""

from __future__ import annotations

import onnx


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """A simpler model with the same inputs, outputs, metadata and values.

    Constants are folded, and what no output needs is dropped.
    """
    from onnxscript import optimizer

    simpler: onnx.ModelProto = optimizer.optimize(model)
    del simpler.metadata_props[:]
    simpler.metadata_props.extend(model.metadata_props)
    return simpler
