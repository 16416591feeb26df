"""Latents: what it accepts, keeps and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latentguard.errors import LatentsError
from latentguard.spaces import SPACES, Latents


def sdxl(count: int = 3, **options: Any) -> Latents:
    return Latents(torch.randn(count, 4, 8, 6), "sdxl", scaled=True, **options)


def test_a_spatial_batch_knows_its_size() -> None:
    latents = sdxl(ids=["a", "b", "c"])
    assert latents.space is SPACES["sdxl"]
    assert (latents.height, latents.width, len(latents)) == (8, 6, 3)
    assert repr(latents) == "Latents(sdxl scaled spatial, 3 of 8x6 cells, float32)"


def test_slicing_keeps_the_names() -> None:
    latents = sdxl(ids=["a", "b", "c"])
    assert latents[1:].ids == ("b", "c")
    assert latents[-1].ids == ("c",)
    assert latents[0].tensor.shape == (1, 4, 8, 6)
    assert [one.ids for one in latents] == [("a",), ("b",), ("c",)]
    assert sdxl()[0].ids is None
    with pytest.raises(IndexError):
        latents[3]
    with pytest.raises(LatentsError, match="must not be empty"):
        latents[3:]


def test_to_changes_the_tensor_only() -> None:
    latents = sdxl(ids=["a", "b", "c"]).to(torch.float16)
    assert latents.tensor.dtype == torch.float16
    assert latents.ids == ("a", "b", "c")
    with pytest.raises(LatentsError, match="floating point, got int64"):
        latents.to(torch.int64)


def test_concatenation() -> None:
    both = Latents.cat([sdxl(1, ids=["a"]), sdxl(2, ids=["b", "c"])])
    assert both.ids == ("a", "b", "c")
    assert both.tensor.shape == (3, 4, 8, 6)
    assert Latents.cat([sdxl(1, ids=["a"]), sdxl(1)]).ids is None
    with pytest.raises(LatentsError, match="cannot concatenate"):
        Latents.cat([sdxl(), Latents(torch.randn(1, 4, 8, 6), "sdxl", scaled=False)])
    with pytest.raises(LatentsError, match="cannot concatenate"):
        Latents.cat([sdxl(), Latents(torch.randn(1, 4, 8, 8), "sdxl", scaled=True)])
    with pytest.raises(LatentsError, match="nothing to concatenate"):
        Latents.cat([])


def test_conversions_that_change_nothing_return_self() -> None:
    latents = sdxl()
    assert latents.to_scaled() is latents
    assert latents.to_spatial() is latents
    assert latents.to_raw().to_raw().scaled is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor": [[1.0]]}, "must be a torch.Tensor, got list"),
        ({"space": "sdxl2"}, "use one of sdxl"),
        ({"scaled": None}, "scaled must be True .* or False .*got None"),
        ({"scaled": 1}, "scaled must be True"),
        ({"layout": "tokens"}, "layout must be spatial, packed or patches, got 'tokens'"),
        ({"tensor": torch.zeros(1, 4, 8, 6, dtype=torch.int32)}, "floating point, got int32"),
        ({"tensor": torch.zeros(1, 4, 8, 6, dtype=torch.complex64)}, "floating point, got compl"),
        ({"tensor": torch.zeros(0, 4, 8, 6)}, r"must not be empty, got shape \[0, 4, 8, 6\]"),
        ({"tensor": torch.zeros(4, 8, 6)}, r"must be \[B, 4, H, W\], got \[4, 8, 6\]"),
        ({"tensor": torch.zeros(1, 16, 8, 6)}, r"must be \[B, 4, H, W\], got \[1, 16, 8, 6\]"),
        ({"height": 64, "width": 64}, "say 64x64 latent cells, the tensor is 8x6"),
        ({"height": 8}, "say 8xNone latent cells"),
        ({"layout": "packed"}, "sdxl has no packed layout"),
        ({"ids": ["a", "b"]}, "1 latents need as many ids, got 2"),
        (
            {"space": "flux1", "layout": "packed", "tensor": torch.zeros(1, 12, 64)},
            "do not carry their size: give height and width in latent cells",
        ),
        (
            {
                "space": "flux1",
                "layout": "packed",
                "tensor": torch.zeros(1, 12, 64),
                "height": 64,
                "width": 48,
            },
            r"must be \[B, 768, 64\], got \[1, 12, 64\] \(height and width are latent cells",
        ),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    good = {"tensor": torch.zeros(1, 4, 8, 6), "space": "sdxl", "scaled": True}
    with pytest.raises(LatentsError, match=message):
        Latents(**{**good, **arguments})
