"""What is not exported, and that nothing of it is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_helpers import SMALL_B8, sdxl
from exported import photos
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from latentguard.encoders import Encoder, Features
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.errors import LatentsError, ModelError, PolicyError
from latentguard.export import export_onnx, write
from latentguard.export.quantize import convert
from latentguard.ops.onnx import OPSET, translations
from latentguard.spaces import Latents

Models = dict[str, Encoder]


Spoil = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    """Exports whose largest constant is not what PyTorch has."""
    trace = write.trace

    def wrong(*options: Any, **more: Any) -> onnx.ModelProto:
        model = trace(*options, **more)
        tensor = max(model.graph.initializer, key=lambda tensor: tensor.ByteSize())
        array = spoil(numpy_helper.to_array(tensor)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model

    monkeypatch.setattr(write, "trace", wrong)


def shifted(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.roll(array, 1, axis=-1)


def missing(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.arange(array.shape[-1]) == 3, np.nan, array)


@pytest.mark.parametrize(
    ("spoil", "precision", "text"),
    [
        (shifted, "fp32", "its margins differ from PyTorch's by up to"),
        (shifted, "fp16", "its margins differ from PyTorch's by up to"),
        (missing, "fp32", "does not fit its policy: .* is not finite"),
        (shifted, "int8-dynamic", "an embedding has cosine"),
    ],
)
def test_an_export_that_differs_is_not_written(
    spoil: Spoil,
    precision: write.Precision,
    text: str,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoiled(monkeypatch, spoil)
    out = tmp_path / "guard.onnx"
    with pytest.raises(ModelError, match=text) as failed:
        export_onnx("family", models["b8"], out, size=(64, 64), precision=precision)
    assert f"{out}: not written" in str(failed.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_survives_a_failure(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "guard.onnx"
    export_onnx("family", models["b8"], out, size=(64, 64))
    before = out.read_bytes()
    spoiled(monkeypatch, shifted)
    with pytest.raises(ModelError, match="not written"):
        export_onnx("family", models["b8"], out, size=(64, 64))
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["guard.onnx"]


def test_int8_needs_latents_to_calibrate_on(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"int8 needs latents to calibrate on \(--calibrat"):
        export_onnx("family", models["b8"], tmp_path / "a.onnx", size=(64, 64), precision="int8")


def test_latents_of_another_space(models: Models, tmp_path: Path) -> None:
    with pytest.raises(LatentsError, match="reads sdxl latents, got flux2"):
        export_onnx("family", models["b8"], tmp_path / "a.onnx", size=(64, 64), check=photos())


def test_latents_of_another_size(models: Models, tmp_path: Path) -> None:
    with pytest.raises(LatentsError, match=r"reads 64x64 latent cells, .* have 32x32"):
        export_onnx(
            *("family", models["b8"], tmp_path / "a.onnx"), size=(64, 64), check=sdxl(2, (32, 32))
        )


@pytest.mark.parametrize("which", ["pool", "tile", "nano-flux2", "nano-sdxl"])
def test_no_open_size_where_sizes_are_read_differently(
    which: Any, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known from the model: nothing is traced for it."""
    encoder = models.get(which) or LatentCLIP.random(SMALL_B8, resize=which)
    monkeypatch.setattr(write, "trace", lambda *_: pytest.fail("traced"))
    with pytest.raises(ModelError, match=r"reads latents of different sizes .* \(--height 64"):
        export_onnx("family", encoder, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_choice_by_size_that_the_tracer_hides_is_found(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nano has it: the graph is right where it was traced, and wrong elsewhere."""
    encoder = models["b8"]
    features = LatentCLIP.features

    def by_size(self: LatentCLIP, latents: Tensor, *rest: Any) -> Features:
        # An export always takes the first.
        small = torch.compiler.is_exporting() or latents.shape[-1] <= 64
        return features(self, latents if small else latents.flip(-1), *rest)

    monkeypatch.setattr(LatentCLIP, "features", by_size)
    with pytest.raises(ModelError, match="reads latents of different sizes"):
        export_onnx("family", encoder, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


class _Causal(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("module", "text"),
    [(_Causal(), "masks that are added"), (torch.nn.GELU("tanh"), "approximate='tanh'")],
)
def test_operators_of_other_kinds_are_refused(module: torch.nn.Module, text: str) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        torch.onnx.export(
            module.eval(),
            (torch.ones(1, 2, 4, 64),),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translations(),
            verbose=False,
        )
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, ModelError):
        error = error.__cause__
    assert error is not None
    assert text in str(error)


def test_images_in_tiles_cannot_be_exported(tmp_path: Path) -> None:
    tiled = LatentCLIP.random(SMALL_B8, resize="tile")
    with pytest.raises(ModelError, match="in tiles"):
        export_onnx("family", tiled, tmp_path / "a.onnx", size=(96, 64))


def test_an_unknown_policy_or_model(models: Models, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no-such"):
        export_onnx("no-such", models["b8"], tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="no-such"):
        export_onnx("family", "no-such", tmp_path / "a.onnx")


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out]
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), tmp_path / "a.onnx")
    batch = [{"x": np.ones(1, np.float32)}]
    with pytest.raises(ModelError, match="precision must be one of fp16, int8, int8-dynamic"):
        convert(tmp_path / "a.onnx", tmp_path / "b.onnx", "int4", batch)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no constant matrix or convolution"):
        convert(tmp_path / "a.onnx", tmp_path / "b.onnx", "int8", batch)
    assert not (tmp_path / "b.onnx").exists()


def test_latents_that_are_not_finite_are_not_a_check(models: Models, tmp_path: Path) -> None:
    tensor = sdxl(2, (64, 64)).tensor.clone()
    tensor[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="not written"):
        export_onnx(
            *("family", models["b8"], tmp_path / "a.onnx"),
            size=(64, 64),
            check=Latents(tensor, "sdxl", scaled=True),
        )
    assert list(tmp_path.iterdir()) == []
