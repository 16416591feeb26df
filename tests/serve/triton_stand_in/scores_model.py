"""The exported file by ONNX Runtime within Triton's Python backend, for a server that comes without
the ONNX Runtime backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

OUTPUTS = ["probability", "margin", "best_prompt", "embedding"]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = str(Path(__file__).with_name("model.onnx"))
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        arrays = [
            pb_utils.get_input_tensor_by_name(request, "latents").as_numpy() for request in requests
        ]
        found = self.session.run(OUTPUTS, {"latents": np.concatenate(arrays)})
        responses, begin = [], 0
        for array in arrays:
            end = begin + len(array)
            tensors = [
                pb_utils.Tensor(name, values[begin:end])
                for name, values in zip(OUTPUTS, found, strict=True)
            ]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            begin = end
        return responses
