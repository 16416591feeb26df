"""From a diffusers `vae.config` to a LatentSpace; refuses what it does not know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from latentguard.errors import LatentsError

if TYPE_CHECKING:
    from latentguard.spaces.space import LatentSpace

    Spaces = Mapping[str, LatentSpace]

# scaling_factor is a published four-digit constant: this only forgives its float32 round trip.
_CLOSE = 1e-4


def space_from_vae_config(config: Mapping[str, Any], spaces: Spaces) -> LatentSpace:
    """See `LatentSpace.from_vae_config`; `spaces` are the known ones, by name."""
    _refuse_tiny(config, spaces)
    advice = f"name the space yourself if you know that it is one of {', '.join(spaces)}"
    channels = config.get("latent_channels")
    if not isinstance(channels, int):
        raise LatentsError(f"the VAE config has no latent_channels: {advice}")
    _check_factor(config)
    if "batch_norm_eps" in config or channels == 32:
        return _flux2(config, channels, spaces, advice)
    scale, shift = _number(config, "scaling_factor"), _number(config, "shift_factor") or 0.0
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        return _normalized_sdxl(config, channels, scale, spaces, advice)
    for space in spaces.values():
        if space.channels != channels or isinstance(space.scale, tuple) or space.scale is None:
            continue
        assert isinstance(space.shift, float)
        if scale is not None and _close(scale, space.scale) and _close(shift, space.shift):
            return replace(space, scale=scale, shift=shift)
    raise LatentsError(
        f"the VAE config (latent_channels {channels}, scaling_factor {scale}, shift_factor "
        f"{shift}) is of no known latent space: {advice}"
    )


def _refuse_tiny(config: Mapping[str, Any], spaces: Spaces) -> None:
    # The class name is not always in the config; latent_magnitude is AutoencoderTiny's alone.
    if config.get("_class_name") == "AutoencoderTiny" or "latent_magnitude" in config:
        raise LatentsError(
            "an AutoencoderTiny's config does not say which latents it decodes (its "
            "scaling_factor of 1.0 is not the model's): take the space from the pipeline's class, "
            "LatentSpace.get(...) with one of " + ", ".join(spaces)
        )


def _check_factor(config: Mapping[str, Any]) -> None:
    blocks = config.get("block_out_channels")
    if blocks is not None and len(blocks) != 4:
        raise LatentsError(
            f"the VAE config has {len(blocks)} block_out_channels, so one latent cell is "
            f"{2 ** (len(blocks) - 1)} pixels wide: the known latent spaces have 4 blocks and 8 "
            "pixels"
        )


def _flux2(config: Mapping[str, Any], channels: int, spaces: Spaces, advice: str) -> LatentSpace:
    patch = config.get("patch_size")
    if channels != 32 or "batch_norm_eps" not in config or tuple(patch or ()) != (2, 2):
        raise LatentsError(
            f"the VAE config (latent_channels {channels}, patch_size {patch}, batch_norm_eps "
            f"{config.get('batch_norm_eps')}) is not FLUX.2's (32, (2, 2), 1e-4): {advice}"
        )
    return spaces["flux2"]


def _normalized_sdxl(
    config: Mapping[str, Any], channels: int, scale: float | None, spaces: Spaces, advice: str
) -> LatentSpace:
    """SDXL latents normalized per channel: scaled = (raw - mean) * scale / std (Playground 2.5)."""
    sdxl = spaces["sdxl"]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None or scale is None:
        raise LatentsError(
            "the VAE config must give latents_mean, latents_std and scaling_factor together"
        )
    # A config may nest the numbers as [[[a], [b], ...]].
    means, stds = _flat(mean), _flat(std)
    assert sdxl.mean is not None
    assert sdxl.std is not None
    same = len(means) == len(stds) == channels == sdxl.channels and all(
        math.isclose(a, b, rel_tol=1e-2)
        for a, b in zip((*means, *stds), (*sdxl.mean, *sdxl.std), strict=True)
    )
    if not same:
        raise LatentsError(
            f"the VAE config's latents_mean {means} and latents_std {stds} are not those of the "
            f"SDXL VAE ({list(sdxl.mean)}, {list(sdxl.std)}): {advice}"
        )
    return replace(sdxl, scale=tuple(scale / value for value in stds), shift=tuple(means))


def _flat(values: Any) -> list[float]:
    if isinstance(values, (int, float)):
        return [float(values)]
    if not isinstance(values, (list, tuple)):
        raise LatentsError(
            f"the VAE config's latents_mean and latents_std must be numbers: {values!r}"
        )
    return [number for value in values for number in _flat(value)]


def _number(config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LatentsError(f"the VAE config's {key} must be a number, got {value!r}")
    return float(value)


def _close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=_CLOSE, abs_tol=1e-9)
