"""The graphs of the packaged models, for judging without torch: made once, and shipped.

    python -m latentguard.export.bundle

A graph reads what `latentguard.bundled.prepare` makes of latents, and the concept bank, both as
inputs. Its weights are the float16 numbers of NAME.safetensors beside it, at their places in that
file, so that the package has them once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from torch import Tensor, nn

from latentguard.atomic import replacing
from latentguard.bundled.weights import WEIGHTS, read_weights
from latentguard.encoders.catalog import bundled_path
from latentguard.encoders.class_text import NAMES, normalize, similarities, table_digest
from latentguard.encoders.minilm import minilm
from latentguard.encoders.nano import BUNDLED, NanoEncoder, load_nano
from latentguard.encoders.nano_net import NanoNet, RgbViewNet
from latentguard.export.graph import build
from latentguard.export.optimize import optimize
from latentguard.scorer import Scorer

INLINE = 4096
"""Bytes of float32 below which a constant stays in the graph."""


class _Prepared(nn.Module):
    """The part of a network that reads grids of any size, in its place."""

    def __init__(self, net: NanoNet | RgbViewNet) -> None:
        super().__init__()
        self.net, self.trunk, self.crop_side = net, net.trunk, net.crop_side

    def feature_map(self, prepared: Tensor) -> Tensor:
        return self.net.read(prepared)


def bundle(name: str, out: Path | None = None) -> Path:
    """Write the graph of a packaged model, beside its weights or to `out`."""
    weights = bundled_path(name)
    # Whose view it is does not bear on this part.
    encoder = load_nano(name, "cpu", "sdxl" if name == "nano-view" else None)
    channels, side = (
        (3, 192) if isinstance(encoder.net, RgbViewNet) else (encoder_channels(encoder), 32)
    )
    encoder.net = _Prepared(encoder.net)  # type: ignore[assignment]
    model = build(
        Scorer("observe", encoder),
        side,
        side + 32,
        scaled=encoder.needs_scaled,
        heatmaps=True,
        dynamic=True,
        channels=channels,
        smallest=8 if side == 32 else 64,
    )
    model = optimize(model)
    _refer(model, weights)
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = WEIGHTS, read_weights(weights).sha256
    path = out or weights.with_suffix(".onnx")
    with replacing(path) as file:
        file.write(model.SerializeToString())
    return path


def encoder_channels(encoder: NanoEncoder) -> int:
    """Channels that an adapter reads."""
    assert isinstance(encoder.net, NanoNet)
    return encoder.net.adapter.small.conv.in_channels  # type: ignore[union-attr, return-value]


def _refer(model: onnx.ModelProto, weights: Path) -> None:
    """Take constants out of the graph that the weights' file has, and refer to them there."""
    held = read_weights(weights)
    known = {
        array.astype(np.float32).tobytes(): (key, array.shape)
        for key, array in held.tensors.items()
        if array.dtype == np.float16
    }
    graph = model.graph
    for tensor in [*graph.initializer]:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or array.nbytes < INLINE:
            continue
        found, turned = known.get(array.tobytes()), False
        if found is None and array.ndim == 2:
            found, turned = known.get(np.ascontiguousarray(array.T).tobytes()), True
        assert found is not None, f"{tensor.name} is not in {weights.name}"
        key, shape = found
        begin, end = held.places[key]
        half = onnx.TensorProto(
            name=f"{tensor.name}.half",
            data_type=onnx.TensorProto.FLOAT16,
            dims=shape if turned else array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        place = {"location": weights.name, "offset": begin, "length": end - begin}
        for entry, value in place.items():
            half.external_data.add(key=entry, value=str(value))
        graph.initializer.append(half)
        graph.initializer.remove(tensor)
        wide = f"{tensor.name}.wide" if turned else tensor.name
        nodes = [onnx.helper.make_node("Cast", [half.name], [wide], to=onnx.TensorProto.FLOAT)]
        if turned:
            nodes.append(onnx.helper.make_node("Transpose", [wide], [tensor.name], perm=[1, 0]))
        for node in reversed(nodes):
            graph.node.insert(0, node)


def bundle_names(out: Path = NAMES) -> Path:
    """Write how near the classes' names are to each other, for the table of the packaged models."""
    weights = read_weights(bundled_path(BUNDLED[0]))
    table = weights.tensors["text.table"].astype(np.float32)
    names = [normalize(name) for name in weights.text("class_names")]
    rows = similarities(minilm().encode(names).numpy(), table)
    with replacing(out) as file:
        np.savez_compressed(file, table=table_digest(table), rows=rows)
    return out


if __name__ == "__main__":
    print(bundle_names())
    for one in BUNDLED:
        print(bundle(one))
