"""What curators and trainers store, each file made the way that its tool makes it."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from files_helpers import npy_bytes, only_error, read_all, torch_bytes, write_tar
from safetensors.torch import load_file, save_file

from latentguard.files import PassedOver, Record, load_latents, numpy_files, read_arrays

SD: dict[str, Any] = {"space": "sdxl", "scaled": False}
FLUX: dict[str, Any] = {"space": "flux1", "scaled": True}


def image(channels: int = 4, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, height, width, generator=generator) * 4


def good(path: Path, **said: Any) -> list[Record]:
    records = read_all(path, **said)
    assert [record.error for record in records] == [None] * len(records)
    return records


def tensors(records: list[Record]) -> list[torch.Tensor]:
    return [record.latents.tensor[0] for record in records if record.latents is not None]


def same(records: list[Record], *expected: torch.Tensor) -> None:
    assert len(records) == len(expected)
    for found, wanted in zip(tensors(records), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


# -- sd-scripts ------------------------------------------------------------------------------


def sd_scripts(path: Path, *latents: torch.Tensor, sizes: bool, flipped: bool = True) -> Path:
    """As LatentsCachingStrategy.save_latents_to_disk does: resolutions are added to one file."""
    kept: dict[str, Any] = {}
    for one in latents:
        suffix = f"_{one.shape[-2]}x{one.shape[-1]}" if sizes else ""
        kept["latents" + suffix] = one.numpy()
        kept["original_size" + suffix] = np.array([768, 768])
        kept["crop_ltrb" + suffix] = np.array([0, 0, 512, 512])
        if flipped:
            kept["latents_flipped" + suffix] = torch.flip(one, [2]).numpy()
        kept["alpha_mask" + suffix] = np.ones((one.shape[-2] * 8, one.shape[-1] * 8), np.float32)
    np.savez(path, **kept)
    return path


def test_sd_scripts(tmp_path: Path) -> None:
    latents = image()
    same(
        good(sd_scripts(tmp_path / "a_0064x0064_sdxl.npz", latents, sizes=False), **SD),
        latents,
        latents.flip(2),
    )


def test_several_resolutions_of_sd_scripts(tmp_path: Path) -> None:
    small, tall = image(16), image(16, 12, 8)
    path = sd_scripts(tmp_path / "a_flux.npz", small, tall, sizes=True)
    records = good(path, **FLUX)
    assert [record.id for record in records] == [
        "latents_12x8", "latents_8x8", "latents_flipped_12x8", "latents_flipped_8x8",
    ]  # fmt: skip
    same(records, tall, small, tall.flip(2), small.flip(2))
    one = sd_scripts(tmp_path / "b.npz", small, sizes=True, flipped=False)
    assert [record.id for record in good(one, **FLUX)] == [None]


def test_sd_scripts_in_a_shard(tmp_path: Path) -> None:
    path = sd_scripts(tmp_path / "a.npz", image(), sizes=False)
    shard = write_tar(tmp_path / "a.tar", {"007.latent.npz": path.read_bytes()})
    records = good(shard, **SD)
    assert [record.id for record in records] == ["007/latents", "007/latents_flipped"]


def test_another_array_beside_those_of_sd_scripts_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latents_8x8=image().numpy(), latents_small=image().numpy())
    first, second = read_all(tmp_path / "a.npz", **SD)
    assert first.error is None
    assert "holds latents_small, which" in (second.error or "")


# -- ComfyUI ---------------------------------------------------------------------------------


def comfyui(path: Path, latents: torch.Tensor, old: bool = False) -> Path:
    """As SaveLatent does; before version 0 it wrote scaled latents."""
    output = {"latent_tensor": latents.contiguous()}
    if not old:
        output["latent_format_version_0"] = torch.tensor([])
    save_file(output, path, metadata={"prompt": json.dumps({"3": {}}), "workflow": "{}"})
    return path


def load_latent(path: Path) -> torch.Tensor:
    """As LoadLatent does."""
    latent = load_file(path)
    multiplier = 1.0 if "latent_format_version_0" in latent else 1.0 / 0.18215
    samples: torch.Tensor = latent["latent_tensor"].float() * multiplier
    return samples


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("suffix", [".latent", ".safetensors"])
def test_comfyui(tmp_path: Path, old: bool, suffix: str) -> None:
    path = comfyui(tmp_path / f"ComfyUI_00001_{suffix}", image()[None].repeat(2, 1, 1, 1), old)
    records = good(path, space="sd1")
    same(records, *load_latent(path))
    assert [record.latents.scaled for record in records if record.latents] == [False] * 2
    assert "the file says scaled False" in only_error(path, space="sd1", scaled=True)


def test_half_precision_of_an_old_latent_is_widened_as_comfyui_does(tmp_path: Path) -> None:
    path = comfyui(tmp_path / "a.latent", image()[None].half(), old=True)
    same(good(path, space="sd1"), *load_latent(path))


def test_a_folder_of_comfyui(tmp_path: Path) -> None:
    for number in range(3):
        comfyui(tmp_path / f"ComfyUI_{number:05}_.latent", image(seed=number)[None])
    (tmp_path / "broken.latent").write_bytes(b"x")
    records = read_all(tmp_path, space="sdxl")
    assert [record.error is None for record in records] == [True, True, True, False]


def test_patches_of_comfyui_say_their_scaling(tmp_path: Path) -> None:
    """Its VAE of FLUX.2 normalizes, so nothing is taken for granted."""
    path = comfyui(tmp_path / "a.latent", image(128, 4, 4)[None])
    assert good(path, space="flux2", scaled=True)[0].latents is not None


def test_what_nodes_hand_on(tmp_path: Path) -> None:
    value = {"samples": image()[None], "noise_mask": torch.ones(1, 1, 64, 64), "batch_index": [0]}
    torch.save(value, tmp_path / "a.pt")
    same(good(tmp_path / "a.pt", **SD), image())


# -- trainers --------------------------------------------------------------------------------


def test_gzip_of_simpletuner(tmp_path: Path) -> None:
    """With compress_disk_cache: torch.save into gzip, under the name .pt."""
    target = io.BytesIO()
    with gzip.GzipFile(fileobj=target, mode="wb") as compressed:
        torch.save(image(), compressed)
    (tmp_path / "a.pt").write_bytes(target.getvalue())
    same(good(tmp_path / "a.pt", **SD), image())
    shard = write_tar(tmp_path / "a.tar", {"0.latent.pt": target.getvalue()})
    same(good(shard, **SD), image())


def test_damaged_and_hostile_gzip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(torch_bytes(image()), mtime=0)
    path = tmp_path / "a.pt"
    for data, message in (
        (whole[:-9], "is a truncated gzip file"),
        (whole + whole, "more data follows after its end"),
        (whole + b"\0", "more data follows after its end"),
        (whole[:-8] + bytes(8), "is a damaged gzip file (Error -3"),
        (whole[:20] + b"\xff" * 20 + whole[40:], "is a damaged gzip file"),
        (gzip.compress(b"x" * 99, mtime=0), "is not a file of torch.save"),
        (gzip.compress(whole, mtime=0), "is compressed with gzip"),
    ):
        path.write_bytes(data)
        assert message in only_error(path, **SD)
    from latentguard.files import compressed

    monkeypatch.setattr(compressed, "MIN_INFLATED", 1000)
    monkeypatch.setattr(compressed, "MAX_RATIO", 2)
    path.write_bytes(gzip.compress(bytes(10**6), mtime=0))
    assert "unpacks to more than" in only_error(path, **SD)


def test_musubi(tmp_path: Path) -> None:
    """save_latent_cache_common: the picture's size is in the metadata, and not theirs."""
    latents = image(16, 8, 6)[:, None].bfloat16()
    metadata = {
        "architecture": "flux_kontext", "width": "640", "height": "480", "format_version": "1.0.1",
    }  # fmt: skip
    path = tmp_path / "a_0640x0480_fk.safetensors"
    save_file({"latents_1x8x6_bfloat16": latents}, path, metadata=metadata)
    same(good(path, **FLUX), latents[:, 0])
    control = {"latents_1x8x6_bfloat16": latents, "latents_control_1x8x6_bfloat16": latents.clone()}
    save_file(control, path, metadata=metadata)
    assert "holds latents_control_1x8x6_bfloat16," in (read_all(path, **FLUX)[-1].error or "")
    same(good(path, **FLUX, key="latents_1x8x6_bfloat16"), latents[:, 0])


def test_onetrainer(tmp_path: Path) -> None:
    """A disk cache of mgds: one .pt a sample, a dict of what the pipeline has made of it."""
    value = {
        "latent_image": image(),
        "latent_mask": torch.ones(1, 8, 8),
        "original_resolution": (64, 64),
        "crop_offset": (0, 0),
        "tokens": torch.ones(77, dtype=torch.int64),
    }
    torch.save(value, tmp_path / "0.pt")
    same(good(tmp_path / "0.pt", **SD), image())


def test_lists_of_dicts(tmp_path: Path) -> None:
    first, second = image(seed=1), image(seed=2)
    value: list[dict[str, Any]] = [{"latents": first, "prompt": "a"}, {"latents": second}]
    torch.save(value, tmp_path / "a.pt")
    records = good(tmp_path / "a.pt", **SD)
    same(records, first, second)
    assert [record.id for record in records] == ["0", "1"]
    value[1]["id"] = "second"
    torch.save(value, tmp_path / "a.pt")
    assert [record.id for record in good(tmp_path / "a.pt", **SD)] == ["0", "second"]
    torch.save([{**one, "ids": [f"n{n}"]} for n, one in enumerate(value)], tmp_path / "a.pt")
    assert [record.id for record in good(tmp_path / "a.pt", **SD)] == ["n0", "n1"]
    value[1]["more"] = image(seed=3)
    torch.save(value, tmp_path / "a.pt")
    assert "holds more," in (read_all(tmp_path / "a.pt", **SD)[-1].error or "")
    del value[1]["more"]
    value[1]["space"] = "sd1"
    torch.save(value, tmp_path / "a.pt")
    value[0]["space"] = "sdxl"
    torch.save(value, tmp_path / "a.pt")
    assert "the dict at place 1 of its list says space 'sd1'" in only_error(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_latents_by_name(tmp_path: Path, suffix: str) -> None:
    named = {"a.png": image(seed=1), "b.png": image(4, 6, 8, seed=2)}
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(named, path)
    elif suffix == ".npz":
        np.savez(path, **{name: one.numpy() for name, one in named.items()})
    else:
        save_file(named, path)
    records = good(path, **SD)
    same(records, *named.values())
    assert [record.id for record in records] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "more",
    [
        {"crop": torch.zeros(2)},
        {"prompt": "a cat"},
        {"other": image(16)},
        {"prompt_embeds": torch.zeros(4, 77, 768)},
        {"batch": torch.stack([image(), image()])},
        {"labels": torch.zeros(4, 8, 8, dtype=torch.int64)},
    ],
)
def test_arrays_of_another_kind_are_no_latents_by_name(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    torch.save({"a": image(), "b": image(), **more}, tmp_path / "a.pt")
    assert "needs the key latents, it holds a, b" in only_error(tmp_path / "a.pt", **SD)


# -- training sets ---------------------------------------------------------------------------


def test_lightningdit(tmp_path: Path) -> None:
    """extract_features.py: as many flipped latents as latents, and their labels."""
    latents = torch.randn(3, 32, 4, 4)
    dict_latents = {
        "latents": latents, "latents_flip": latents.flip(3).contiguous(),
        "labels": torch.tensor([1, 2, 3]),
    }  # fmt: skip
    path = tmp_path / "latents_rank00_shard000.safetensors"
    metadata = {"total_size": "3", "dtype": "torch.float32", "device": "cpu"}
    save_file(dict_latents, path, metadata=metadata)
    records = good(path, space="flux2", scaled=True)
    same(records, *latents, *latents.flip(3))
    assert [record.id for record in records][::3] == ["latents/0", "latents_flip/0"]


@pytest.mark.parametrize("batch", [False, True])
def test_means_and_deviations_of_edm2(tmp_path: Path, batch: bool) -> None:
    """encode in dataset_tool.py: mean and standard deviation, 8 channels, in one .npy an image."""
    means, deviations = image(), image(seed=1).abs()
    both = torch.cat([means, deviations]).numpy()
    np.save(tmp_path / "img-mean-std-00000000.npy", both[None] if batch else both)
    path = tmp_path / "img-mean-std-00000000.npy"
    said = {"space": "sd1", "scaled": False}
    same(good(path, **said, moments=True), means)
    assert "say --moments" in only_error(path, **said)
    np.save(path, np.stack([both, both]))
    same(good(path, **said, moments=True), means, means)


def test_moments_of_mar(tmp_path: Path) -> None:
    """main_cache.py: the posterior's parameters, and those of the flipped image."""
    moments = np.concatenate([image(16).numpy(), image(16, seed=1).numpy()])
    path = tmp_path / "n01440764_10026.npz"
    np.savez(path, moments=moments, moments_flip=moments[..., ::-1].copy())
    records = good(path, space="flux1", scaled=False)
    same(records, image(16), image(16).flip(2))
    assert [record.id for record in records] == ["moments", "moments_flip"]


def test_moments_beside_latents_are_an_error(tmp_path: Path) -> None:
    torch.save({"latents": image(), "moments": torch.zeros(8, 8, 8)}, tmp_path / "a.pt")
    assert "holds moments," in (read_all(tmp_path / "a.pt", **SD)[-1].error or "")


def test_moments_of_a_torch_file(tmp_path: Path) -> None:
    both = torch.cat([image(), image(seed=1)])
    torch.save({"moments": both.transpose(1, 2)}, tmp_path / "a.pt")  # strides of their own
    same(good(tmp_path / "a.pt", **SD), image().transpose(1, 2).contiguous())
    save_file({"moments": both}, tmp_path / "a.safetensors")
    same(good(tmp_path / "a.safetensors", **SD), image())
    torch.save({"moments": image()[:3]}, tmp_path / "b.pt")
    assert "moments must be [B, 2 * C, H, W]" in only_error(tmp_path / "b.pt", **SD)


def test_img2dataset(tmp_path: Path) -> None:
    """KEY.npy beside KEY.json, whose width and height are those of the picture."""
    says = {
        "caption": "a cat", "url": "https://example.com/cat.jpg", "key": "000000001",
        "status": "success", "error_message": None, "width": 64, "height": 48,
        "original_width": 640, "original_height": 480, "exif": "{}", "sha256": "00",
    }  # fmt: skip
    members = {
        "000000001.jpg": b"\xff\xd8\xff",
        "000000001.json": json.dumps(says).encode(),
        "000000001.npy": npy_bytes(image().numpy()),
        "000000001.txt": b"a cat",
    }
    shard = write_tar(tmp_path / "00000.tar", members)
    records = good(shard, **SD, member="npy")
    same(records, image())
    assert records[0].id == "000000001"
    assert "say how they are named (--member npy)" in only_error(shard, **SD)


def test_quantized_latents(tmp_path: Path) -> None:
    """imagenet.int8 decodes (x / 255 - 0.5) * 24."""
    quantized = (image() / 24 + 0.5).clamp(0, 1).mul(255).to(torch.uint8)
    np.save(tmp_path / "a.npy", quantized.numpy())
    torch.save({"latents": quantized}, tmp_path / "a.pt")
    save_file({"latents": quantized}, tmp_path / "a.safetensors")
    np.savez_compressed(tmp_path / "a.npz", latents=quantized.numpy())
    expected = (quantized.numpy().astype(np.float32) / 255.0 - 0.5) * 24.0
    for path in sorted(tmp_path.iterdir()):
        for said in ("imagenet.int8", f"{24 / 255},127.5", (24 / 255, 127.5)):
            (found,) = tensors(good(path, **SD, dequantize=said))
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert "say --dequantize SCALE,ZERO" in only_error(path, **SD)


def test_bfloat16_of_numpy(tmp_path: Path) -> None:
    """np.save of ml_dtypes' bfloat16, as JAX and MLX have it, writes |V2."""
    latents = image().bfloat16()
    np.save(tmp_path / "a.npy", image().numpy().astype(ml_dtypes.bfloat16))
    np.savez(tmp_path / "a.npz", latents=image().numpy().astype(ml_dtypes.bfloat16))
    np.save(tmp_path / "bits.npy", latents.view(torch.uint16).numpy())
    for path in sorted(tmp_path.iterdir()):
        same(good(path, **SD, dtype="bfloat16"), latents)
        assert "--dtype bfloat16" in only_error(path, **SD)
    np.save(tmp_path / "a.npy", image().numpy())  # a type that is said is not overruled
    same(good(tmp_path / "a.npy", **SD, dtype="bfloat16"), image())


def test_tokens_of_the_readme(tmp_path: Path) -> None:
    photos = load_latents(Path(__file__).parents[1] / "spaces" / "taef2_photos.safetensors")
    tokens = photos.to_packed().tensor
    one = photos[:1].to_packed().tensor.float().cpu().numpy()
    assert one.flags.f_contiguous  # [1, N, C] of a tensor whose cells were moved to the end
    np.save(tmp_path / "one.npy", one)
    np.save(tmp_path / "latents.npy", tokens.float().cpu().numpy())
    said = {"space": "flux2", "scaled": True, "layout": "packed"}
    same(good(tmp_path / "latents.npy", **said, height=32, width=32), *photos.tensor.float())
    same(good(tmp_path / "one.npy", **said, height=32, width=32), photos.tensor[0].float())
    pixels = good(tmp_path / "latents.npy", **said, height=256, width=256, pixels=True)
    same(pixels, *photos.tensor.float())
    torch.save({"latents": tokens, "height": 256, "width": 256}, tmp_path / "a.pt")
    assert "--pixels" in only_error(tmp_path / "a.pt", space="flux2", scaled=True)
    same(good(tmp_path / "a.pt", space="flux2", scaled=True, pixels=True), *photos.tensor)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_views_in_fortran_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """What np.save makes of a tensor that was permuted, as a pipeline's tokens are."""
    latents = torch.stack([image(seed=1), image(seed=2), image(seed=3)])
    fortran = np.asfortranarray(latents.numpy())
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, fortran)
    else:
        np.savez_compressed(path, latents=fortran)
    same(good(path, **SD), *latents)
    monkeypatch.setattr(numpy_files, "MAX_GATHERED", 1000)
    assert "is in Fortran order, of which all 3072 bytes have to be read at once" in only_error(
        path, **SD
    )


def test_a_single_latent(tmp_path: Path) -> None:
    torch.save({"latent": image(), "mask": torch.ones(1, 8, 8)}, tmp_path / "a.pt")
    same(good(tmp_path / "a.pt", **SD), image())
    np.savez(tmp_path / "a.npz", latent=image().numpy(), label=np.int64(3))
    same(good(tmp_path / "a.npz", **SD), image())


def test_what_is_left_aside_is_counted(tmp_path: Path) -> None:
    torch.save({"clean": image(), "noisy": image()}, tmp_path / "a.pt")
    write_tar(tmp_path / "a.tar", {"0.a.npy": npy_bytes(image().numpy()), "0.b.npy": b"x"})
    passed = PassedOver()
    records = list(read_arrays(tmp_path, **SD, passed=passed, key="clean", member="a.npy"))
    assert [record.error for record in records] == [None, None]
    assert passed.line() == (
        "skipped on request: 1 other array (--key), 1 other shard member (--member)"
    )


def test_a_name_over_the_limit(tmp_path: Path) -> None:
    torch.save({"a" * 2000: image(), "b": image()}, tmp_path / "a.pt")
    assert "an id has 2000 characters" in only_error(tmp_path / "a.pt", **SD)
