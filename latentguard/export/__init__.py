"""ONNX export: from a policy and a model to one file that runs anywhere."""

from __future__ import annotations

from latentguard.export.swap import swap_policy
from latentguard.export.triton import Repository, export_triton
from latentguard.export.triton_config import TritonOptions
from latentguard.export.write import Checked, Exported, export_onnx

__all__ = [
    "Checked",
    "Exported",
    "Repository",
    "TritonOptions",
    "export_onnx",
    "export_triton",
    "swap_policy",
]
