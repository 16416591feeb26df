"""The forms in which pipelines hold latents: patches, tokens and an axis of one frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.errors import LatentsError
from latentguard.files import load_latents, read_arrays, save_latents
from latentguard.files.claims import Claims, plan
from latentguard.spaces import SPACES, Latents, LatentSpace

PHOTOS = load_latents(Path(__file__).parents[1] / "spaces" / "taef2_photos.safetensors")
FLUX2 = SPACES["flux2"]
PATCHES = FLUX2.patchify(PHOTOS.tensor)
TOKENS = PHOTOS.to_packed().tensor


def arrays(path: Path, **said: Any) -> list[np.ndarray[Any, Any]]:
    records = list(read_arrays(path, **said))
    assert [record.error for record in records] == [None] * len(records), records[0].error
    return [record.latents.array[0] for record in records if record.latents is not None]


def error(path: Path, **said: Any) -> str:
    (record,) = read_arrays(path, **said)
    assert record.error is not None
    return record.error


@pytest.mark.parametrize("suffix", ["pt", "npy", "npz", "safetensors"])
@pytest.mark.parametrize("said", [{}, {"space": "flux2"}, {"space": "flux2", "layout": "patches"}])
def test_patches_of_flux2(tmp_path: Path, suffix: str, said: dict[str, Any]) -> None:
    path = tmp_path / f"a.{suffix}"
    patches = PATCHES.contiguous()
    if suffix == "pt":
        torch.save(patches, path)
    elif suffix == "npy":
        np.save(path, patches.numpy())
    elif suffix == "npz":
        np.savez(path, latents=patches.numpy())
    else:
        from safetensors.torch import save_file

        save_file({"latents": patches}, path)
    read = arrays(path, **said)
    np.testing.assert_array_equal(np.stack(read), PHOTOS.tensor.numpy())


def test_raw_patches_are_told_from_scaled_ones(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", (PATCHES * 1.75).contiguous().numpy())
    assert [record.latents.scaled for record in read_arrays(tmp_path / "a.npy")] == [False] * 4  # type: ignore[union-attr]


def test_one_image_as_patches(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PATCHES[0].contiguous().numpy())
    (image,) = arrays(tmp_path / "a.npy", space="flux2", scaled=True)
    np.testing.assert_array_equal(image, PHOTOS.tensor[0].numpy())


def test_patches_of_another_size_than_is_said(tmp_path: Path) -> None:
    latents = PATCHES.contiguous()
    torch.save({"latents": latents, "height": 16, "width": 16}, tmp_path / "a.pt")
    records = list(read_arrays(tmp_path / "a.pt", "flux2", True))
    assert all("the tensor is 32x32" in (record.error or "") for record in records)
    torch.save({"latents": latents, "height": 256, "width": 256}, tmp_path / "b.pt")
    records = list(read_arrays(tmp_path / "b.pt", "flux2", True))
    assert all("these are pixels, so divide them by 8" in (r.error or "") for r in records)


def test_latents_that_are_said_to_be_spatial_are_no_patches(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PATCHES[:1].contiguous().numpy())
    said = error(tmp_path / "a.npy", space="flux2", scaled=True, layout="spatial")
    assert "must be [B, 32, H, W], got [1, 128, 16, 16]: these are patches" in said
    np.save(tmp_path / "b.npy", PHOTOS.tensor[:1].numpy())
    said = error(tmp_path / "b.npy", space="flux2", scaled=True, layout="patches")
    assert "patches must be [B, 128, H/2, W/2], got [1, 32, 32, 32]" in said
    assert "no packed layout" in error(
        tmp_path / "b.npy", space="sana", scaled=True, layout="patches"
    )


def test_the_operator_says_what_tokens_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ascontiguousarray(TOKENS.numpy()))
    said = {"space": "flux2", "scaled": True, "layout": "packed"}
    read = arrays(tmp_path / "a.npy", **said, height=32, width=32)
    np.testing.assert_array_equal(np.stack(read), PHOTOS.tensor.numpy())
    assert (
        "do not carry their size"
        in next(
            iter(read_arrays(tmp_path / "a.npy", **said))  # type: ignore[arg-type]
        ).error
    )
    wrong = list(read_arrays(tmp_path / "a.npy", **said, height=16, width=64))  # type: ignore[arg-type]
    assert "the rows" in (wrong[0].error or "")


def test_tokens_of_ideogram_are_read_in_their_order(tmp_path: Path) -> None:
    space = LatentSpace.get("ideogram4")
    tokens = PHOTOS.tensor.unflatten(2, (16, 2)).unflatten(4, (16, 2)).permute(0, 2, 4, 3, 5, 1)
    np.save(tmp_path / "a.npy", tokens.reshape(4, 256, 128).contiguous().numpy())
    size = {"layout": "packed", "height": 32, "width": 32}
    read = arrays(tmp_path / "a.npy", space=space, scaled=True, **size)
    np.testing.assert_array_equal(np.stack(read), PHOTOS.tensor.numpy())
    # Saved with their order, they come back as they were: a file cannot say another one.
    packed = Latents(PHOTOS.tensor, space, True).to_packed()
    save_latents(tmp_path / "b.pt", packed)
    np.testing.assert_array_equal(load_latents(tmp_path / "b.pt").tensor, PHOTOS.tensor)


def test_tokens_of_flux2_are_recognized_where_their_size_is_said(tmp_path: Path) -> None:
    tokens = {"latents": TOKENS.contiguous(), "height": 32, "width": 32}
    torch.save(tokens, tmp_path / "a.pt")
    records = list(read_arrays(tmp_path / "a.pt"))
    assert [record.error for record in records] == [None] * 4
    assert [record.latents.scaled for record in records if record.latents] == [True] * 4
    torch.save(tokens | {"latents": TOKENS * 1.75}, tmp_path / "b.pt")
    (first, *_) = read_arrays(tmp_path / "b.pt")
    assert first.latents is not None
    assert not first.latents.scaled
    # In the order of another pipeline they are no pictures of this space.
    ideogram = Latents(PHOTOS.tensor, LatentSpace.get("ideogram4"), True).to_packed().tensor
    torch.save(tokens | {"latents": ideogram}, tmp_path / "c.pt")
    assert "--space flux2" in error(tmp_path / "c.pt")
    np.save(tmp_path / "d.npy", np.zeros((1, 64, 64), np.float32))
    said = error(tmp_path / "d.npy", layout="packed", height=16, width=16)
    assert "packed latents are not recognized" in said


def test_patches_of_another_order_are_not_known(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PATCHES[:1].contiguous().numpy())
    said = error(tmp_path / "a.npy", space="ideogram4", scaled=True)
    assert "tokens have the order dy dx c, and patches of such an order are not known" in said


def test_an_operator_s_layout_does_not_overrule_the_file_s(tmp_path: Path) -> None:
    save_latents(tmp_path / "a.pt", PHOTOS.to_packed())
    assert "the file says layout 'packed', the metadata next to it says 'spatial'" in error(
        tmp_path / "a.pt", layout="spatial"
    )
    assert "says height 32" in error(tmp_path / "a.pt", height=16, width=64)
    with pytest.raises(LatentsError, match="layout must be spatial or packed or patches"):
        read_arrays(tmp_path / "a.pt", layout="tokens")  # type: ignore[arg-type]


# -- one frame -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "npy"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", ["wan21", "wan22", "sd1"])
def test_one_frame_is_an_image(tmp_path: Path, suffix: str, batched: bool, name: str) -> None:
    tensor = torch.randn(3 if batched else 1, SPACES[name].channels, 1, 6, 5)
    given = tensor if batched else tensor[0]
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":  # strides of an axis that is left out
        torch.save(given.transpose(-1, -2).contiguous().transpose(-1, -2), path)
    else:
        np.save(path, given.numpy())
    read = arrays(path, space=name, scaled=True)
    np.testing.assert_array_equal(np.stack(read), tensor[:, :, 0].numpy())


@pytest.mark.parametrize("frames", [2, 5, 21])
def test_a_video_is_refused(tmp_path: Path, frames: int) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 16, frames, 8, 8), np.float32))
    said = error(tmp_path / "a.npy", space="wan21", scaled=True)
    assert said.startswith(f"latents of a video are not images ({frames} frames, got shape [1, 16,")
    # A trainer's file of one sample, [C, T, H, W].
    torch.save({"latents": torch.zeros(16, frames, 8, 8), "space": "wan21"}, tmp_path / "b.pt")
    assert "latents of a video are not images" in error(tmp_path / "b.pt", scaled=True)
    with pytest.raises(LatentsError, match="latents of a video are not images"):
        Latents(torch.zeros(1, 16, frames, 8, 8), "wan21", scaled=True)


def test_latents_with_one_frame_in_python() -> None:
    tensor = torch.randn(2, 16, 1, 6, 4)
    latents = Latents(tensor, "wan21", scaled=True)
    assert latents.tensor.shape == (2, 16, 6, 4)
    assert latents.tensor.data_ptr() == tensor.data_ptr()
    assert latents.to_packed().tensor.shape == (2, 6, 64)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 130), min_size=1, max_size=6).map(tuple))
def test_a_plan_never_changes_how_many_numbers_there_are(shape: tuple[int, ...]) -> None:
    for claims in (Claims(), *(Claims(space=name) for name in ("sd1", "flux2", "wan21"))):
        try:
            found = plan(shape, claims)
        except LatentsError:
            continue
        assert found.count * int(np.prod(found.shape)) == int(np.prod(shape))
        assert found.frames is None or shape[found.frames] == 1


def test_patches_in_python() -> None:
    latents = Latents(PATCHES, "flux2", scaled=True, layout="patches")
    assert (latents.height, latents.width) == (32, 32)
    torch.testing.assert_close(latents.to_spatial().tensor, PHOTOS.tensor)
    torch.testing.assert_close(latents.to_packed().tensor, TOKENS)
    assert len(latents[1:3]) == 2
    statistics = FLUX2.with_batch_norm([0.1] * 128, [3.0] * 128)
    raw = Latents(PATCHES.float(), statistics, True, "patches").to_raw()
    assert raw.layout == "spatial"
    torch.testing.assert_close(raw.to_scaled().tensor, PHOTOS.tensor.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(LatentsError, match="these are patches, so say layout='patches'"):
        Latents(PATCHES, "flux2", scaled=True)
