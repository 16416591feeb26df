"""From a float32 .onnx file to a float16 or 8-bit one.

8-bit weights keep to 7 bits: without VNNI a CPU adds two 8-bit products in 16 bits, which
saturates otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import onnx
from numpy.typing import NDArray

from latentguard.errors import ModelError

Precision = Literal["fp16", "int8", "int8-dynamic"]
Batch = dict[str, NDArray[Any]]


class _Batches:
    """Calibration inputs as onnxruntime's quantiser reads them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Batch | None:
        return next(self._batches, None)


def convert(
    source: Path, target: Path, precision: Precision, batches: Iterable[Batch] | None = None
) -> None:
    """Write `source` (float32) as `target` in another precision; the metadata is kept.

    Args:
        source: a float32 .onnx file, with its external data beside it where it has some.
        target: the file to write.
        precision: fp16 keeps inputs and outputs in float32; int8 has fixed ranges, calibrated on
            `batches`; int8-dynamic takes activation ranges from each input.
        batches: inputs by name, for int8; representative of what the model will read, and none
            of what it will be judged on.

    Raises:
        ModelError: int8 without batches.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model.onnx"
        if precision == "fp16":
            _half(source, written)
        elif precision == "int8-dynamic":
            quantize_dynamic(
                source,
                written,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
        else:
            if batches is None:
                raise ModelError(
                    "precision int8 needs calibration inputs: give batches of latents, or use "
                    "int8-dynamic"
                )
            quantize_static(
                source,
                written,
                _Batches(batches),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Conv"],
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        converted = onnx.load(written)
    metadata = onnx.load(source, load_external_data=False).metadata_props
    del converted.metadata_props[:]
    converted.metadata_props.extend(metadata)
    onnx.save(converted, target)


def _half(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


__all__ = ["Batch", "Precision", "convert"]
