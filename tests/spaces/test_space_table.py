"""The table of spaces, found by name and by VAE config; no torch needed for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from latentguard.errors import LatentsError
from latentguard.spaces import SPACES, LatentSpace


def test_names_channels_and_packing() -> None:
    table = {s.name: (s.channels, s.vae_scale_factor, s.packed_channels) for s in SPACES.values()}
    assert table == {
        "sdxl": (4, 8, 4),
        "sd1": (4, 8, 4),
        "sd3": (16, 8, 16),
        "flux1": (16, 8, 64),
        "flux2": (32, 8, 128),
        "wan21": (16, 8, 64),
        "wan22": (48, 16, 48),
        "hunyuan-video": (16, 8, 16),
        "hunyuan-video-1.5": (32, 16, 32),
        "hunyuan-image-2.1": (64, 32, 64),
        "qwen-image-2.1": (64, 16, 64),
        "cosmos1": (16, 8, 16),
        "mochi": (12, 8, 12),
        "sana": (32, 32, 32),
        "ltxv": (128, 32, 128),
        "ltx2": (128, 32, 128),
    }
    for space in SPACES.values():
        assert space.rgb_factors is None or len(space.rgb_factors) == space.channels
        assert hash(space) == hash(LatentSpace.get(space.name))


def test_unknown_name_lists_the_known_ones() -> None:
    said = r"'sd2' \(did you mean sd3\?\): use one of sdxl, sd1, sd3, flux1, flux2"
    with pytest.raises(LatentsError, match=said):
        LatentSpace.get("sd2")


def test_the_table_does_not_import_torch() -> None:
    code = (
        "import sys; from latentguard.spaces import SPACES, LatentSpace\n"
        "LatentSpace.from_vae_config({'latent_channels': 4, 'scaling_factor': 0.13025})\n"
        "import latentguard.files\n"
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sdxl", {"latent_channels": 4, "scaling_factor": 0.13025, "shift_factor": None}),
        ("sd1", {"latent_channels": 4, "scaling_factor": 0.18215}),
        ("sd3", {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
        ("flux1", {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    ],
)
def test_real_autoencoder_kl_configs(name: str, config: dict[str, float]) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        **config,
    )
    assert LatentSpace.from_vae_config(vae.config) == SPACES[name]


def test_a_config_keeps_its_own_digits() -> None:
    space = LatentSpace.from_vae_config({"latent_channels": 4, "scaling_factor": 0.130251})
    assert space.name == "sdxl"
    assert space.scale == 0.130251


def test_playground_25_is_sdxl_with_its_own_scaling() -> None:
    sdxl = SPACES["sdxl"]
    assert sdxl.mean is not None
    assert sdxl.std is not None
    space = LatentSpace.from_vae_config(
        {
            "latent_channels": 4,
            "scaling_factor": 0.5,
            "latents_mean": list(sdxl.mean),
            "latents_std": [[[value]] for value in sdxl.std],
        }
    )
    assert space.name == "sdxl"
    assert space.shift == sdxl.mean
    assert space.scale == tuple(0.5 / value for value in sdxl.std)
    assert space != sdxl


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AutoencoderTiny", "latent_channels": 4}, "take the space from the pipel"),
        ({"latent_channels": 4, "latent_magnitude": 3, "scaling_factor": 1.0}, "AutoencoderTiny"),
        ({}, "no latent_channels"),
        ({"latent_channels": 4, "scaling_factor": 1.0}, "of no known latent space"),
        ({"latent_channels": 4, "scaling_factor": "0.1"}, "must be a number, got '0.1'"),
        ({"latent_channels": 16, "scaling_factor": 0.5}, "of no known latent space"),
        ({"latent_channels": 16, "scaling_factor": 1.5305}, "shift_factor 0.0"),
        (
            {"latent_channels": 4, "scaling_factor": 0.08333, "block_out_channels": [1, 2, 3]},
            "one latent cell is 4 pixels wide",
        ),
        ({"latent_channels": 32, "scaling_factor": 0.3}, "of no known latent space"),
        (
            {"latent_channels": 16, "batch_norm_eps": 1e-4, "patch_size": (2, 2)},
            "is not FLUX.2's",
        ),
        ({"latent_channels": 4, "scaling_factor": 0.5, "latents_mean": [0] * 4}, "together"),
        (
            {
                "latent_channels": 4,
                "scaling_factor": 0.5,
                "latents_mean": [0] * 4,
                "latents_std": [1] * 4,
            },
            "not those of the SDXL VAE",
        ),
    ],
)
def test_refused_configs(config: dict[str, object], message: str) -> None:
    with pytest.raises(LatentsError, match=message):
        LatentSpace.from_vae_config(config)


def test_a_real_tiny_autoencoder_is_refused() -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4)
    )
    with pytest.raises(LatentsError, match=r"scaling_factor of 1\.0 is not the model's"):
        LatentSpace.from_vae_config(vae.config)
