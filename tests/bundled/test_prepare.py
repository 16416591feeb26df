"""What depends on the size of latents, in NumPy against PyTorch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.bundled.prepare import grid_of, picture_of, resize_matrix
from latentguard.encoders import load_encoder
from latentguard.encoders.nano import NanoEncoder
from latentguard.encoders.nano_net import NanoNet, RgbViewNet

SIZES = [(32, 32), (64, 64), (128, 128), (24, 24), (8, 8), (50, 41), (96, 168), (7, 300), (1, 1)]


@settings(deadline=None, max_examples=40)
@given(
    before=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    after=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    kind=st.sampled_from(["linear", "cubic"]),
    antialias=st.booleans(),
)
def test_resizing_is_pytorchs(
    before: tuple[int, int],
    after: tuple[int, int],
    kind: Literal["linear", "cubic"],
    antialias: bool,
) -> None:
    if antialias:  # for smaller pictures alone; PyTorch itself is wrong for a single column
        before = (max(before[0], 2), max(before[1], 2))
        after = (max(2, min(after[0], before[0])), max(2, min(after[1], before[1])))
    x = torch.rand(1, 2, *before, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mode = {"linear": "bilinear", "cubic": "bicubic"}[kind]
    expected = F.interpolate(x, size=after, mode=mode, antialias=antialias).numpy()
    rows, columns = (
        resize_matrix(n, m, kind, antialias=antialias) for n, m in zip(before, after, strict=True)
    )
    found = rows.astype(np.float64) @ x.numpy() @ columns.astype(np.float64).T
    assert found == pytest.approx(expected, abs=2e-6)
    assert rows.sum(1) == pytest.approx(1, abs=1e-6)


def nano(name: str, space: str) -> NanoEncoder:
    encoder = load_encoder(name, "cpu", space if name == "nano-view" else None)
    assert isinstance(encoder, NanoEncoder)
    return encoder


def read_by(net: NanoNet | RgbViewNet, latents: torch.Tensor) -> np.ndarray:
    """What a network's own preparation hands to the part that reads any size."""
    seen: list[torch.Tensor] = []
    part = net.adapter.small if isinstance(net, NanoNet) else net.stem
    hook = part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        net.feature_map(latents)
    hook.remove()
    return seen[0].numpy()


@pytest.mark.parametrize("size", SIZES)
def test_the_grid_of_an_adapter(size: tuple[int, int]) -> None:
    net = nano("nano-flux2", "flux2").net
    assert isinstance(net, NanoNet)
    assert net.adapter.halve is not None
    latents = torch.randn(2, 32, *size, generator=torch.Generator().manual_seed(1))
    halve, bias = (part.detach().numpy() for part in net.adapter.halve.parameters())
    found = grid_of(latents.numpy(), halve, bias, net.adapter.mean.numpy(), net.adapter.std.numpy())
    assert found.dtype == np.float32
    assert found == pytest.approx(read_by(net, latents), abs=2e-4)


@pytest.mark.parametrize("space", ["sdxl", "flux2", "wan21"])
@pytest.mark.parametrize("size", SIZES)
def test_the_picture_of_a_view(size: tuple[int, int], space: str) -> None:
    net = nano("nano-view", space).net
    assert isinstance(net, RgbViewNet)
    latents = torch.randn(2, len(net.factors), *size, generator=torch.Generator().manual_seed(1))
    found = picture_of(
        latents.numpy(), net.factors.numpy(), net.bias.numpy(), net.size, net.octaves
    )
    expected = read_by(net, latents)
    assert (found.clip(0, 1) - 127 / 255) / (128 / 255) == pytest.approx(expected, abs=2e-4)
