"""Autoencoders of every class: the numbers are diffusers' own, in a space that is told right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

from latentguard.encode import load_autoencoder  # noqa: E402
from latentguard.encode.encoding import How  # noqa: E402
from latentguard.encode.tiny import tae_encoder  # noqa: E402
from latentguard.errors import LatentsError, ModelError, UsageError  # noqa: E402
from latentguard.files import read_latents, save_latents  # noqa: E402
from latentguard.spaces import SPACES, LatentSpace  # noqa: E402

Made = Callable[[], Any]
NARROW = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8,) * 4,
    "norm_num_groups": 4,
}
DC = {
    "latent_channels": 32,
    "attention_head_dim": 8,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (32,) * 6,
    "decoder_block_out_channels": (32,) * 6,
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "encoder_qkv_multiscales": ((),) * 6,
    "decoder_qkv_multiscales": ((),) * 6,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


def kl(**config: Any) -> Made:
    return lambda: diffusers.AutoencoderKL(**NARROW, **config)


def video(name: str, **config: Any) -> Made:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    return lambda: getattr(diffusers, name)(**config)


SDXL = kl(latent_channels=4, scaling_factor=0.13025)
# The space, the pixels of a cell times those of a token, and whether there is a distribution.
EVERY: dict[str, tuple[str, int, bool, Callable[[], Made]]] = {
    "sdxl": ("sdxl", 8, True, lambda: SDXL),
    "sd1": ("sd1", 8, True, lambda: kl(latent_channels=4)),
    "sd3": (
        "sd3", 8, True,
        lambda: kl(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
    ),
    "flux1": (
        "flux1", 16, True,
        lambda: kl(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
    ),
    "flux2": ("flux2", 16, True, lambda: video("AutoencoderKLFlux2", **NARROW)),
    "wan": ("wan21", 16, True, lambda: video("AutoencoderKLWan", base_dim=8, num_res_blocks=1)),
    "qwen": (
        "wan21", 16, True, lambda: video("AutoencoderKLQwenImage", base_dim=8, num_res_blocks=1)
    ),
    "qwen21": (
        "qwen-image-2.1", 16, True,
        lambda: video(
            "AutoencoderKLQwenImage21", base_dim=8, decoder_base_dim=8, num_res_blocks=1
        ),
    ),
    "dc": ("sana", 32, False, lambda: video("AutoencoderDC", **DC)),
    "ltx": (
        "ltxv", 32, True,
        lambda: video(
            "AutoencoderKLLTXVideo",
            block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        ),
    ),
}  # fmt: skip


def saved(folder: Path, make: Made) -> Any:
    torch.manual_seed(0)
    vae = make().eval()
    if hasattr(vae, "bn"):
        vae.bn.running_mean.normal_(0, 0.5)
        vae.bn.running_var.uniform_(0.5, 2)
    vae.save_pretrained(folder)
    return vae


def own(vae: Any, images: torch.Tensor) -> Any:
    """What diffusers gives: a distribution, or latents."""
    x = images * 2 - 1
    if vae.config.get("in_channels", 3) == 4:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    several = type(vae).__name__ in (
        "AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21",
        "AutoencoderKLLTXVideo",
    )  # fmt: skip
    with torch.inference_mode():
        output = vae.encode(x[:, :, None] if several else x)
    return output.latent_dist if hasattr(output, "latent_dist") else output.latent


@pytest.mark.parametrize("name", EVERY)
def test_the_numbers_are_diffusers_own(name: str, tmp_path: Path) -> None:
    space, multiple, samples, made = EVERY[name]
    vae = saved(tmp_path / "vae", made())
    found = load_autoencoder(tmp_path / "vae")
    assert (found.space.name, found.multiple, found.samples) == (space, multiple, samples)
    assert not found.scaled
    images = torch.rand(2, 3, 64, 64)
    latents = found.encode(images)
    distribution = own(vae, images)
    mean = distribution.mean if samples else distribution
    mean = mean.squeeze(2) if mean.ndim == 5 else mean
    # Channels-last convolutions add in another order: measured 4e-6 at most.
    torch.testing.assert_close(latents.tensor, mean, atol=1e-4, rtol=1e-4)
    if samples:
        drawn = found.encode(images, [7, 8]).tensor
        one = own(vae, images[1:]).sample(torch.Generator().manual_seed(8))
        one = one.squeeze(2) if one.ndim == 5 else one
        torch.testing.assert_close(drawn[1:], one, atol=1e-4, rtol=1e-4)
    # What is written says what it is, and is scaled as the pipeline scales it.
    path = tmp_path / "latents.safetensors"
    save_latents(path, latents.to_scaled())
    (first, _) = read_latents([path])
    assert first.latents is not None
    assert (first.latents.space.name, first.latents.scaled) == (space, True)
    wanted = found.space.to_scaled(mean[:1])
    torch.testing.assert_close(first.latents.tensor, wanted, atol=1e-3, rtol=1e-3)


def test_scaling_is_the_pipelines(tmp_path: Path) -> None:
    """Against the pipelines' own expressions."""
    images = torch.rand(1, 3, 64, 64)
    vae = saved(tmp_path / "flux1", EVERY["flux1"][3]())
    mean = own(vae, images).mean
    scaled = load_autoencoder(tmp_path / "flux1").encode(images).to_scaled().tensor
    torch.testing.assert_close(scaled, (mean - 0.1159) * 0.3611, atol=1e-4, rtol=1e-4)
    vae = saved(tmp_path / "wan", EVERY["wan"][3]())
    mean = own(vae, images).mean.squeeze(2)
    shift, std = (
        torch.tensor(vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    scaled = load_autoencoder(tmp_path / "wan").encode(images).to_scaled().tensor
    torch.testing.assert_close(scaled, (mean - shift) / std, atol=1e-3, rtol=1e-3)
    vae = saved(tmp_path / "flux2", EVERY["flux2"][3]())
    patches = torch.nn.functional.pixel_unshuffle(own(vae, images).mean, 2)
    variance = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    wanted = (patches - vae.bn.running_mean.view(1, -1, 1, 1)) / variance
    found = load_autoencoder(tmp_path / "flux2").encode(images).to_scaled()
    scaled = torch.nn.functional.pixel_unshuffle(found.tensor, 2)
    torch.testing.assert_close(scaled, wanted, atol=1e-4, rtol=1e-4)


def test_a_tiny_autoencoder_of_diffusers(tmp_path: Path) -> None:
    vae = saved(
        tmp_path / "vae",
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(64,) * 4, decoder_block_out_channels=(64,) * 4
        ),
    )
    with pytest.raises(ModelError, match=r"4 channels fit sd.*; say which space \(--space\)"):
        load_autoencoder(tmp_path / "vae")
    found = load_autoencoder(tmp_path / "vae", "sdxl")
    assert (found.space.name, found.scaled, found.samples) == ("sdxl", True, False)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = vae.encode(images * 2 - 1).latents
    torch.testing.assert_close(found.encode(images).tensor, wanted, atol=1e-4, rtol=1e-4)
    # The same weights as a file: of the whole autoencoder, by diffusers' names of the layers.
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    as_file = load_autoencoder(file, "sdxl").encode(images).tensor
    torch.testing.assert_close(as_file, wanted, atol=1e-4, rtol=1e-4)


def test_files_of_tiny_encoders(tmp_path: Path, tiny_file: Path) -> None:
    found = load_autoencoder(tiny_file)
    assert (found.space.name, found.scaled, found.multiple) == ("flux2", True, 16)
    state = torch.load(tiny_file, weights_only=True)
    safe = tmp_path / "taef2_encoder.safetensors"
    safetensors.torch.save_file(state, safe)
    again = load_autoencoder(safe)
    assert again.sha256 != found.sha256
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again.encode(images).tensor, found.encode(images).tensor)
    with pytest.raises(ModelError, match="32 channels, those of space sdxl have 4"):
        load_autoencoder(safe, "sdxl")


def test_a_pipelines_folder(tmp_path: Path) -> None:
    saved(tmp_path / "model" / "vae", SDXL)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    assert load_autoencoder(tmp_path / "model").name == "model"


def test_what_is_no_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no autoencoder at"):
        load_autoencoder(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"neither it nor its vae/ has a config\.json"):
        load_autoencoder(tmp_path)
    config = tmp_path / "config.json"
    for name in ("UNet2DConditionModel", "os", "AutoencoderOfTomorrow", 3):
        config.write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ModelError, match="is not an autoencoder of diffusers"):
            load_autoencoder(tmp_path)
    config.write_text("[]")
    with pytest.raises(ModelError, match="not readable"):
        load_autoencoder(tmp_path)


def test_weights_that_are_a_pickle_are_not_read(tmp_path: Path) -> None:
    saved(tmp_path, SDXL)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), tmp_path / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="not a readable diffusers autoencoder"):
        load_autoencoder(tmp_path)


def test_a_name_on_the_hub_is_not_fetched_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="someone/some-vae is not on this machine: --download"):
        load_autoencoder("someone/some-vae")


def test_another_space_than_the_configs(tmp_path: Path) -> None:
    saved(tmp_path / "sdxl", SDXL)
    with pytest.raises(ModelError, match="encodes sdxl latents, not sd1"):
        load_autoencoder(tmp_path / "sdxl", "sd1")
    saved(tmp_path / "own", kl(latent_channels=4, scaling_factor=0.7))
    with pytest.raises(ModelError, match="is of no known latent space"):
        load_autoencoder(tmp_path / "own")
    space = LatentSpace("my-space", channels=4, scale=0.7)
    assert load_autoencoder(tmp_path / "own", space).space is space
    with pytest.raises(ModelError, match=r"latents \[1, 4, 8, 8\], those of space my-wide are"):
        load_autoencoder(tmp_path / "own", LatentSpace("my-wide", channels=8, scale=0.7))


def test_what_is_written_where_the_scaling_is_unusual(tmp_path: Path) -> None:
    """Playground 2.5 scales SDXL's latents in its own way: raw ones are the same for all."""
    numbers = {
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    }
    saved(tmp_path / "vae", kl(latent_channels=4, scaling_factor=0.5, **numbers))
    found = load_autoencoder(tmp_path / "vae")
    assert found.space.name == "sdxl"
    assert not How.of(found).scaled
    saved(tmp_path / "sdxl", SDXL)
    assert How.of(load_autoencoder(tmp_path / "sdxl")).scaled


def test_what_cannot_be_asked_of_an_autoencoder(tiny_file: Path) -> None:
    tiny = load_autoencoder(tiny_file)
    with pytest.raises(UsageError, match="no distribution: use --mode mean"):
        How.of(tiny, mode="sample")
    with pytest.raises(LatentsError, match="batch-norm"):
        How.of(tiny, scaled=False)
    with pytest.raises(UsageError, match="multiple of 16 pixels"):
        How.of(tiny, size=500)


def test_half_precision_is_near(tiny_file: Path) -> None:
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8), size=64, mode="bicubic")
    exact = load_autoencoder(tiny_file).encode(images.clamp(0, 1)).tensor
    half = load_autoencoder(tiny_file, dtype="bfloat16").encode(images.clamp(0, 1)).tensor
    assert half.dtype == torch.float32
    # bfloat16 has eight bits: measured 0.011 of the deviation, of TAEF2's own weights, too.
    assert (half - exact).square().mean().sqrt() < 0.03 * exact.std()


def test_the_network_of_files_is_the_one_of_every_size() -> None:
    for channels, pooled in ((4, False), (16, False), (32, True)):
        with torch.inference_mode():
            assert tae_encoder(channels, pooled=pooled)(torch.rand(1, 3, 16, 24)).shape == (
                1, channels, 2, 3,
            )  # fmt: skip
    assert SPACES["flux2"].channels == 32
