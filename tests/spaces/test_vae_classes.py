"""The spaces of diffusers' own VAE classes, in their default configurations."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from latentguard.errors import LatentsError
from latentguard.spaces import RECORDS, SPACES, LatentSpace

diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")

CLASSES = sorted({name for r in RECORDS.values() if r.vae for name in r.vae.classes})
OF_CLASS = {
    "AutoencoderKLFlux2": "flux2",
    "AutoencoderKLWan": "wan21",
    "AutoencoderKLQwenImage": "wan21",
    "AutoencoderKLQwenImage21": "qwen-image-2.1",
    "AutoencoderKLHunyuanVideo": "hunyuan-video",
    "AutoencoderKLHunyuanVideo15": "hunyuan-video-1.5",
    "AutoencoderKLCosmos": "cosmos1",
    "AutoencoderKLMochi": "mochi",
    "AutoencoderKLLTXVideo": "ltxv",
    "AutoencoderKLLTX2Video": "ltx2",
}


def defaults(name: str) -> dict[str, Any]:
    """The configuration that a class of diffusers has by default; nothing is built."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_exist(name: str) -> None:
    assert inspect.isclass(getattr(diffusers, name))


@pytest.mark.parametrize("name", OF_CLASS)
def test_a_default_configuration_is_of_its_space(name: str) -> None:
    space = LatentSpace.from_vae_config(defaults(name), [name, "ModelMixin"])
    assert space.is_scaled_as(SPACES[OF_CLASS[name]])
    assert space.name == OF_CLASS[name]


def test_numbers_that_are_a_space_s_own_need_no_class() -> None:
    for name in ("AutoencoderKLQwenImage", "AutoencoderKLMochi", "AutoencoderKLHunyuanVideo"):
        assert LatentSpace.from_vae_config(defaults(name)).name == OF_CLASS[name]
    sana = {"latent_channels": 32, "scaling_factor": 0.41407}
    assert LatentSpace.from_vae_config(sana, ["AutoencoderDC"]).name == "sana"


def test_wan_22_is_told_from_wan_21_by_its_channels() -> None:
    wan = RECORDS["wan22"].fields
    mean, scale = wan["shift"], wan["scale"]
    config = defaults("AutoencoderKLWan") | {
        "z_dim": 48,
        "latents_mean": list(mean),
        "latents_std": [1 / value for value in scale],
        "scale_factor_spatial": 16,
    }
    assert LatentSpace.from_vae_config(config, ["AutoencoderKLWan"]) == SPACES["wan22"]
    with pytest.raises(LatentsError, match="of no known latent space"):
        LatentSpace.from_vae_config(config | {"scale_factor_spatial": 8}, ["AutoencoderKLWan"])


@pytest.mark.parametrize("name", ["AutoencoderKLLTXVideo", "AutoencoderKLHunyuanVideo15"])
def test_numbers_that_others_have_too_need_the_class(name: str) -> None:
    with pytest.raises(LatentsError, match="of no known latent space"):
        LatentSpace.from_vae_config(defaults(name))


@pytest.mark.parametrize(
    "name",
    [
        "AutoencoderKLCogVideoX",
        "AutoencoderKLAllegro",
        "AutoencoderKLMagvit",
        "AutoencoderKLHunyuanImageRefiner",
        "AutoencoderDC",
    ],
)
def test_other_classes_are_of_no_known_space(name: str) -> None:
    with pytest.raises(LatentsError, match="known latent space"):
        LatentSpace.from_vae_config(defaults(name), [name])


def test_another_mean_is_another_space() -> None:
    config = defaults("AutoencoderKLWan")
    config["latents_mean"] = [value + 0.1 for value in config["latents_mean"]]
    with pytest.raises(LatentsError, match=r"are not those of the Wan 2\.1 VAE"):
        LatentSpace.from_vae_config(config, ["AutoencoderKLWan"])


@pytest.mark.parametrize(
    ("pipeline", "space"),
    [
        ("StableDiffusionXLImg2ImgPipeline", "sdxl"),
        ("StableDiffusion3Pipeline", "sd3"),
        ("StableDiffusionPipeline", "sd1"),
        ("LatentConsistencyModelPipeline", "sd1"),
        ("FluxPipeline", "flux1"),
        ("Flux2KleinPipeline", "flux2"),
        ("ChromaPipeline", "flux1"),
        ("QwenImagePipeline", "wan21"),
        ("QwenImage21Pipeline", "qwen-image-2.1"),
        ("Lumina2Pipeline", "flux1"),
        ("LuminaPipeline", "sdxl"),
    ],
)
def test_the_class_of_a_pipeline_tells_its_space(pipeline: str, space: str) -> None:
    assert LatentSpace.of_pipeline(pipeline) == SPACES[space]


def test_pipelines_of_the_records_exist() -> None:
    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    for record in RECORDS.values():
        for start in record.pipelines:
            assert any(name.startswith(start) for name in names), f"{record.name}: {start}"
    assert LatentSpace.of_pipeline("MyPipeline") is None
