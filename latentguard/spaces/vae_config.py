"""From a diffusers `vae.config` to a LatentSpace; refuses what it does not know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from latentguard.errors import LatentsError
from latentguard.spaces.records import SpaceRecord

if TYPE_CHECKING:
    from latentguard.spaces.space import LatentSpace

    Spaces = Mapping[str, LatentSpace]

# scaling_factor is a published four-digit constant: this only forgives its float32 round trip.
_CLOSE = 1e-4
# A published mean or deviation, of however many digits.
_CLOSE_STATISTIC = 1e-2


def space_from_vae_config(
    config: Mapping[str, Any],
    classes: Sequence[str],
    spaces: Spaces,
    records: Sequence[SpaceRecord],
) -> LatentSpace:
    """See `LatentSpace.from_vae_config`; `spaces` are the known ones, by name, and `records` say
    how a VAE of each is told."""
    _refuse_tiny(config, classes, spaces)
    numbers = _Numbers.of(config, spaces)
    if not classes and isinstance(config.get("_class_name"), str):
        classes = [config["_class_name"]]
    told = _by_class(classes, records)
    if "batch_norm_eps" in config:
        return _flux2(config, numbers, spaces)
    same_size = [record for record in told if numbers.sized_as(record)]
    if not same_size and numbers.factor not in (None, *_factors(told)):
        raise LatentsError(
            f"the VAE config says that one latent cell is {numbers.factor} pixels wide: the known "
            "latent spaces with such a VAE have "
            + (" or ".join(map(str, _factors(told))) or "other classes of VAEs")
            + f": {numbers.advice}"
        )
    for record in same_size:
        space = numbers.as_in(record, spaces)
        if space is not None:
            return space
    raise LatentsError(numbers.refusal(same_size, spaces))


def _refuse_tiny(config: Mapping[str, Any], classes: Sequence[str], spaces: Spaces) -> None:
    # The class name is not always in the config; latent_magnitude is AutoencoderTiny's alone.
    named = (config.get("_class_name"), *classes)
    if "AutoencoderTiny" in named or "latent_magnitude" in config:
        raise LatentsError(
            "an AutoencoderTiny's config does not say which latents it decodes (its "
            "scaling_factor of 1.0 is not the model's): take the space from the pipeline's class, "
            "LatentSpace.get(...) with one of " + ", ".join(spaces)
        )


def _by_class(classes: Sequence[str], records: Sequence[SpaceRecord]) -> list[SpaceRecord]:
    """The records whose VAE may be of these classes; of a class that none names, or is not told,
    all of which the numbers are enough."""
    named = {name for record in records if record.vae for name in record.vae.classes}
    known = named.intersection(classes)
    return [
        record
        for record in records
        if record.vae is not None
        and (known.intersection(record.vae.classes) if known else not record.vae.by_class_only)
    ]


def _factors(records: Sequence[SpaceRecord]) -> list[int]:
    return sorted({record.fields["vae_scale_factor"] for record in records})


def _flux2(config: Mapping[str, Any], numbers: _Numbers, spaces: Spaces) -> LatentSpace:
    patch = config.get("patch_size")
    if numbers.channels != 32 or tuple(patch or ()) != (2, 2):
        raise LatentsError(
            f"the VAE config (latent_channels {numbers.channels}, patch_size {patch}, "
            f"batch_norm_eps {config.get('batch_norm_eps')}) is not FLUX.2's (32, (2, 2), 1e-4): "
            f"{numbers.advice}"
        )
    return spaces["flux2"]


@dataclass(frozen=True)
class _Numbers:
    """What a config says of its latents.

    factor: pixels per cell, None where it is not said. advice: what to do where it is not known.
    """

    channels: int
    factor: int | None
    scale: float | None
    shift: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    advice: str

    @classmethod
    def of(cls, config: Mapping[str, Any], spaces: Spaces) -> _Numbers:
        advice = (
            f"name the space yourself if you know that it is one of {', '.join(spaces)}, or "
            "describe it in a file of your own (docs/spaces.md)"
        )
        channels = config.get("latent_channels", config.get("z_dim"))
        if not isinstance(channels, int):
            raise LatentsError(f"the VAE config has no latent_channels: {advice}")
        scale = _number(config, "scaling_factor")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if "latent_channels" not in config and scale is None:
            scale = 1.0  # of VAEs that speak of z_dim, and have a mean and deviation alone
        if (mean is None) is not (std is None) or (mean is not None and scale is None):
            raise LatentsError(
                "the VAE config must give latents_mean, latents_std and scaling_factor together"
            )
        return cls(
            channels=channels,
            factor=_factor(config),
            scale=scale,
            shift=_number(config, "shift_factor") or 0.0,
            mean=None if mean is None else _first_frame(_flat(mean), channels),
            std=None if std is None else _first_frame(_flat(std), channels),
            advice=advice,
        )

    def sized_as(self, record: SpaceRecord) -> bool:
        same = record.fields["channels"] == self.channels
        return same and self.factor in (None, record.fields["vae_scale_factor"])

    def as_in(self, record: SpaceRecord, spaces: Spaces) -> LatentSpace | None:
        """The record's space with these numbers, where they are the record's; else None."""
        space = spaces.get(record.of or record.name)
        if space is None or record.vae is None:
            return None
        if space.statistics_of_vae is not None:  # FLUX.2's are told by batch_norm_eps
            return space if record.vae.by_class_only else None
        if (self.mean is not None) is not record.normalized:
            return None
        scale, shift = record.fields["scale"], record.fields["shift"]
        if self.mean is None:
            assert not isinstance(scale, tuple)
            same = _close(self.scale, scale) and _close(self.shift, shift)
            return replace(space, scale=self.scale, shift=self.shift) if same else None
        assert self.std is not None
        assert self.scale is not None
        usual = record.usual_scale
        std = tuple(usual / factor for factor in scale)
        if not _same_statistics((*self.mean, *self.std), (*shift, *std)):
            return None
        # A pipeline may multiply by a number of its own, which its VAE does not know.
        times = self.scale * usual / (record.vae.scaling_factor or usual)
        return replace(space, scale=tuple(times / value for value in self.std), shift=self.mean)

    def refusal(self, records: Sequence[SpaceRecord], spaces: Spaces) -> str:
        normalized = [record for record in records if record.normalized and record.vae]
        if self.mean is not None and self.std is not None and normalized:
            vaes = " or ".join(dict.fromkeys(r.vae.name for r in normalized if r.vae))
            return (
                f"the VAE config's latents_mean {_shown(self.mean)} and latents_std "
                f"{_shown(self.std)} are not those of {vaes}: {self.advice}"
            )
        statistics = "" if self.mean is None else ", with latents_mean and latents_std"
        return (
            f"the VAE config (latent_channels {self.channels}, scaling_factor {self.scale}, "
            f"shift_factor {self.shift}{statistics}) is of no known latent space: {self.advice}"
        )


def _factor(config: Mapping[str, Any]) -> int | None:
    """Pixels per cell as a config gives them."""
    for key in ("spatial_compression_ratio", "scale_factor_spatial"):
        if isinstance(config.get(key), int):
            return int(config[key])
    blocks = config.get("block_out_channels")
    if blocks is None or "patch_size_t" in config:  # where blocks of LTX's do not all halve
        return None
    halvings = len(blocks) - 1
    return 1 << halvings


def _first_frame(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number a channel, of those that may be given for every frame of a channel."""
    if channels and len(values) > channels and len(values) % channels == 0:
        return values[:: len(values) // channels]
    return values


def _same_statistics(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(found) == len(wanted) and all(
        math.isclose(a, b, rel_tol=_CLOSE_STATISTIC, abs_tol=1e-6)
        for a, b in zip(found, wanted, strict=True)
    )


def _flat(values: Any) -> tuple[float, ...]:
    """A config may nest the numbers as [[[a], [b], ...]]."""
    if isinstance(values, (int, float)):
        return (float(values),)
    if not isinstance(values, (list, tuple)):
        raise LatentsError(
            f"the VAE config's latents_mean and latents_std must be numbers: {values!r}"
        )
    return tuple(number for value in values for number in _flat(value))


def _number(config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LatentsError(f"the VAE config's {key} must be a number, got {value!r}")
    return float(value)


def _close(value: float | None, expected: float | None) -> bool:
    return (
        value is not None
        and expected is not None
        and math.isclose(value, expected, rel_tol=_CLOSE, abs_tol=1e-9)
    )


def _shown(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.5g}" for value in values[:4])
    return f"[{shown}, ...]" if len(values) > 4 else f"[{shown}]"
