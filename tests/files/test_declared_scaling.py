"""A file's own scale and shift decide nothing: the operator's space does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_helpers import npy_bytes, only_error, write_tar
from safetensors.torch import save_file

from latentguard.files import load_latents, read_arrays
from latentguard.spaces import SPACES, Latents, LatentSpace

PLAYGROUND = LatentSpace.get("sdxl-playground25")
SDXL = {"space": "sdxl", "scaled": True}


def write(path: Path, tensor: torch.Tensor, **says: Any) -> Path:
    """One file of any type, with the same declarations."""
    if path.suffix == ".safetensors":
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in says.items()}
        save_file({"latents": tensor}, path, metadata=text)
    elif path.suffix == ".npz":
        np.savez(path, latents=tensor.numpy(), **says)
    elif path.suffix == ".tar":
        members = {"a.latent.npy": npy_bytes(tensor.numpy()), "a.json": json.dumps(says).encode()}
        write_tar(path, members)
    else:
        torch.save({"latents": tensor, **says}, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".tar"])
@pytest.mark.parametrize(
    "says",
    [
        {"scale": 1e20},
        {"scale": 1.0},
        {"scale": 0.131},
        {"shift": [400.0, 0.0, 0.0, 0.0]},
        {"shift": 0.01},
        {"scale": [0.13025, 0.13025, 0.13025, 0.2]},
        {"scale": [0.13025, 0.13025]},
        {"scale": list(PLAYGROUND.scale), "shift": list(PLAYGROUND.shift)},  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_a_scaling_of_the_files_own_is_refused(
    tmp_path: Path, suffix: str, says: dict[str, Any]
) -> None:
    path = write(tmp_path / f"a{suffix}", torch.randn(1, 4, 4, 4), **SDXL, **says)
    for options in ({}, {"space": "sdxl"}, {"space": "sdxl", "scaled": True}):
        error = only_error(path, **options)
        assert error.startswith("the file declares ")
        assert "\n" not in error


def test_a_space_that_is_recognized_has_no_other_scaling(tmp_path: Path) -> None:
    photos = load_latents(Path(__file__).parents[1] / "spaces" / "taef2_photos.safetensors")
    sdxl = SPACES["sdxl"]
    means, stds = (torch.tensor(v).view(4, 1, 1) for v in (sdxl.mean, sdxl.std))
    raw = photos.tensor[:, :4].float() / photos.tensor[:, :4].float().std() * stds + means
    assert load_latents(write(tmp_path / "a.pt", raw)).scaled is False
    assert "own (scale 0.5)" in only_error(write(tmp_path / "b.pt", raw, scale=0.5))


def test_the_numbers_of_the_space_may_be_repeated(tmp_path: Path) -> None:
    tensor = torch.randn(1, 4, 4, 4)
    for says in (
        {"scale": 0.13025, "shift": 0.0},
        {"scale": float(np.float32(0.13025))},
        {"scale": [0.13025] * 4, "shift": [0.0] * 4},
    ):
        back = load_latents(write(tmp_path / "a.pt", tensor, **SDXL, **says))
        assert back.space is SPACES["sdxl"]
        assert torch.equal(back.tensor, tensor)


def test_the_operator_gives_the_scaling_by_its_name_or_as_a_space(tmp_path: Path) -> None:
    raw = torch.randn(1, 4, 4, 4) * 5
    own = Latents(raw, PLAYGROUND, scaled=False).to_scaled().tensor
    says = {"scale": list(PLAYGROUND.scale), "shift": list(PLAYGROUND.shift)}  # type: ignore[arg-type]
    for path in (
        write(tmp_path / "a.pt", own, **SDXL, **says),
        write(tmp_path / "b.pt", own, **SDXL),
        write(tmp_path / "c.pt", own),
    ):
        for space in (PLAYGROUND, "sdxl-playground25"):
            back = load_latents(path, space, True)
            assert back.space == PLAYGROUND
            torch.testing.assert_close(back.to_raw().tensor, raw, rtol=1e-5, atol=1e-5)
    usual = write(tmp_path / "d.pt", own, **SDXL, scale=0.13025)
    assert "not that of sdxl (scale 0.0588741, " in only_error(usual, space=PLAYGROUND)


def test_statistics_in_a_file_do_not_convert_raw_flux2(tmp_path: Path) -> None:
    tensor = torch.randn(1, 32, 4, 4)
    says = {"space": "flux2", "scale": [0.5] * 128, "shift": [0.1] * 128}
    scaled = write(tmp_path / "a.pt", tensor, scaled=True, **says)
    (record,) = read_arrays(scaled)
    assert record.latents is not None
    assert record.latents.space is SPACES["flux2"]
    raw = write(tmp_path / "b.pt", tensor, scaled=False, **says)
    assert "whose statistics only its VAE has" in only_error(raw)
    mine = SPACES["flux2"].with_batch_norm([0.1] * 128, [4.0 - 1e-4] * 128)
    assert load_latents(raw, mine).space == mine
    other = SPACES["flux2"].with_batch_norm([0.1] * 128, [3.0] * 128)
    assert "a scaling of its own" in only_error(raw, space=other)
    says["scale"] = [1e20] * 128
    assert "declares something impossible" in only_error(
        write(tmp_path / "c.pt", tensor, scaled=True, **says)
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".tar"])
def test_packed_tokens_of_a_false_size(tmp_path: Path, suffix: str) -> None:
    photos = load_latents(Path(__file__).parents[2] / "examples" / "latents.pt")[:3]
    tokens = photos.to_packed().tensor.float().contiguous()
    says = {"space": "flux2", "scaled": True, "layout": "packed"}
    true = write(tmp_path / f"a{suffix}", tokens, **says, height=32, width=32)
    assert torch.equal(load_latents(true).tensor, photos.tensor.float())
    # One size is said of all: the picture that denies it speaks for noise that does not.
    tokens[0] = torch.randn(tokens[0].shape)
    false = write(tmp_path / f"b{suffix}", tokens, **says, height=16, width=64)
    assert "said to be of 16x64 cells" in only_error(false)
    assert "32x32 cells fit" in only_error(false)
