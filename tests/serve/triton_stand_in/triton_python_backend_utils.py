"""Stands in for the module that Triton's Python backend gives to a model: requests, tensors and
responses only, with the names and behavior that a model sees. Triton itself is not needed."""

from __future__ import annotations

from typing import Any

import numpy as np


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class InferenceRequest:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = {tensor.name(): tensor for tensor in tensors}


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.tensors.get(name)


class TritonError:
    def __init__(self, text: str) -> None:
        self._text = text

    def message(self) -> str:
        return self._text


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error
