"""An array that can be one image or packed tokens, and is said to be what its numbers deny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from files_helpers import read_all

from latentguard import Latents
from latentguard.files import load_latents

PICTURES = load_latents(Path(__file__).parents[2] / "examples" / "latents.pt")
SAYS: dict[str, Any] = {"space": "flux2", "scaled": True}
PACKED: dict[str, Any] = {**SAYS, "layout": "packed"}


def errors(path: Path, tensor: torch.Tensor, **says: Any) -> list[str | None]:
    torch.save({"latents": tensor.contiguous(), **says}, path)
    return [record.error for record in read_all(path)]


def large(image: torch.Tensor) -> torch.Tensor:
    """One picture of 128x128 cells, as a pipeline of 1,024 pixels gives it."""
    return torch.nn.functional.interpolate(image.float(), size=(128, 128), mode="bicubic")[0]


@pytest.mark.parametrize("number", [15, 13, 19])
@pytest.mark.parametrize("enlarge", [large, lambda image: image[0].repeat(1, 4, 4)])
def test_a_picture_said_to_be_tokens(tmp_path: Path, number: int, enlarge: Any) -> None:
    picture = enlarge(PICTURES[number : number + 1].tensor)
    for height, width in ((16, 32), (8, 64), (2, 256)):
        found = errors(tmp_path / "a.pt", picture, **PACKED, height=height, width=width)
        # Some of these sizes are denied by the rows of tokens already, for the whole file.
        reasons = ("its numbers are those of one image", "do not continue each other")
        assert any(reason in (error or "") for error in found for reason in reasons)
    assert errors(tmp_path / "a.pt", picture, **SAYS) == [None]
    assert errors(tmp_path / "a.pt", picture, **SAYS, layout="spatial") == [None]


def test_tokens_said_to_be_a_picture(tmp_path: Path) -> None:
    """Without a word of their layout they would be read as one image, too."""
    batch = Latents.cat([PICTURES, PICTURES[:7]]).to_packed().tensor
    assert batch.shape == (32, 256, 128)
    for says in (SAYS, {**SAYS, "layout": "spatial"}):
        (error,) = errors(tmp_path / "a.pt", batch, **says)
        assert "its numbers are those of packed tokens" in (error or "")
    assert errors(tmp_path / "a.pt", batch, **PACKED, height=32, width=32) == [None] * 32


def test_noise_and_blank_images_tell_nothing(tmp_path: Path) -> None:
    for tensor in (torch.randn(32, 128, 128), torch.zeros(32, 128, 128)):
        assert errors(tmp_path / "a.pt", tensor, **SAYS) == [None]
        assert errors(tmp_path / "a.pt", tensor, **PACKED, height=16, width=32) == [None] * 32


def test_a_space_without_tokens(tmp_path: Path) -> None:
    picture = large(PICTURES[15:16].tensor)[:16, :, :64]
    assert errors(tmp_path / "a.pt", picture, space="sd3", scaled=True) == [None]
    assert errors(tmp_path / "a.pt", picture, space="flux1", scaled=True) == [None]
