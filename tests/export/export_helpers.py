"""Models, latents and a look into files for the tests of the export room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from latentguard.encoders.catalog import LatentClipConfig
from latentguard.export.samples import drawn
from latentguard.scorer import Scorer
from latentguard.spaces import Latents

# The published sizes but for depth and width, which only cost time here.
SMALL_B8 = LatentClipConfig(
    patch=8, embed_dim=512, text_width=128, width=128, layers=2, text_layers=2
)
SMALL_B4 = LatentClipConfig(
    patch=4, embed_dim=640, text_width=128, width=192, layers=2, text_layers=2
)
# Deep enough for tokens that merged to merge again.
DEEP_B4 = replace(SMALL_B4, width=128, layers=3)


def sdxl(count: int, size: tuple[int, int], scaled: bool = True) -> Latents:
    """Random latents with SDXL's channel statistics."""
    made = drawn("sdxl", size, count)
    return made if scaled else made.to_raw()


@torch.no_grad()
def expected(scorer: Scorer, latents: Latents) -> dict[str, np.ndarray[Any, Any]]:
    """What PyTorch gives, under the names of an export's outputs."""
    scores = scorer.score(latents)
    return {
        "probability": scores.probability.numpy(),
        "margin": scores.margin.numpy(),
        "best_prompt": scores.best_prompt.numpy(),
        "embedding": scorer.encoder.encode_latents(latents).numpy(),
    }


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of each output."""
    return {
        name: float(np.abs(found[name].astype(np.float64) - value).max())
        for name, value in wanted.items()
    }


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of graphs within attributes, too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes(inner)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    """Initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
