"""raw <-> scaled: the numbers that are plausible, and the one place where they are applied.

Torch tensors and NumPy arrays go through the same expressions, so that the two runtimes read the
same latents. Callers give float32 or float64; half precision would round differently in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from latentguard.errors import LatentsError

if TYPE_CHECKING:
    from latentguard.spaces.space import Factors, LatentSpace

# Raw latents of natural images deviate by 0.65 (sd3) to 8.5 (sdxl). Where a space does not say by
# how much its own do, this is taken, which is within a factor of four of every known space.
_TYPICAL_STD = 2.0
# Scaled latents deviate by 0.5 to 1.1 in every published scaling. A factor of 40 beyond that is no
# scaling that a diffusion model was trained with.
PLAUSIBLE_STD = (1 / 40, 40.0)
# A shift is a mean of raw latents: published ones lie within one deviation of the statistics.
PLAUSIBLE_SHIFT = 10.0
# Published factors have four digits or more: this forgives their round trip through float32 alone.
_CLOSE = 1e-4


def check_plausible(space: LatentSpace) -> None:
    """Raises LatentsError for factors of a wrong number, or far from what images could have."""
    for label, value in (("scale", space.scale), ("shift", space.shift)):
        if isinstance(value, tuple) and len(value) not in (space.channels, space.packed_channels):
            raise LatentsError(
                f"space {space.name}: {label} must be one number, {space.channels} or "
                f"{space.packed_channels} numbers, got {len(value)}"
            )
        if not all(math.isfinite(number) for number in _numbers(value)):
            raise LatentsError(f"space {space.name}: {label} must be finite")
    if any(number <= 0 for number in _numbers(space.scale)):
        raise LatentsError(f"space {space.name}: scale must be above 0")
    if space.scale is not None:
        _check_scale(space, _per_cell(space, space.scale))
    if space.shift is not None:
        _check_shift(space, _per_cell(space, space.shift))


def _check_scale(space: LatentSpace, scale: list[float]) -> None:
    for number, std in zip(scale, _per_cell(space, space.std or _TYPICAL_STD), strict=True):
        low, high = (limit / std for limit in PLAUSIBLE_STD)
        if not low <= number <= high:
            raise LatentsError(
                f"space {space.name}: scale must be within {low:.3g} and {high:.3g} (raw latents "
                f"deviate by about {std:.3g}), got {number:.6g}"
            )


def _check_shift(space: LatentSpace, shift: list[float]) -> None:
    means = _per_cell(space, space.mean or 0.0)
    stds = _per_cell(space, space.std or _TYPICAL_STD)
    for number, mean, std in zip(shift, means, stds, strict=True):
        if abs(number - mean) > PLAUSIBLE_SHIFT * std:
            raise LatentsError(
                f"space {space.name}: shift must be within {PLAUSIBLE_SHIFT * std:.3g} of "
                f"{mean:.3g}, the mean of raw latents, got {number:.6g}"
            )


def same_scaling(space: LatentSpace, other: LatentSpace) -> bool:
    """Whether scaled latents of both have the same numbers, but for rounding.

    True where one of them has no numbers of its own (flux2 without statistics): scaled flux2
    latents are normalized, by whatever statistics.
    """
    pairs = ((space.scale, other.scale), (space.shift, other.shift))
    return space.name == other.name and all(
        one is None
        or two is None
        or all(
            math.isclose(a, b, rel_tol=_CLOSE, abs_tol=1e-6)
            for a, b in zip(_per_cell(space, one), _per_cell(space, two), strict=True)
        )
        for one, two in pairs
    )


def to_scaled(raw: Any, space: LatentSpace) -> Any:
    """[..., C, H, W] as the VAE encodes, a tensor or an array, as the diffusion model denoises."""
    return _mapped(raw, space, "scaled", lambda x, scale, shift: (x - shift) * scale)


def to_raw(scaled: Any, space: LatentSpace) -> Any:
    """The inverse of `to_scaled`."""
    return _mapped(scaled, space, "raw", lambda x, scale, shift: x / scale + shift)


def is_standard(space: LatentSpace, standard: LatentSpace, scaled: bool, wanted: bool) -> bool:
    """Whether latents are already raw (wanted False), or in the standard scaling (True)."""
    return scaled is wanted and (not wanted or same_scaling(space, standard))


def to_standard(
    numbers: Any, space: LatentSpace, standard: LatentSpace, scaled: bool, wanted: bool
) -> Any:
    """Latents of a space, scaled or raw, as encoders read them: raw, or scaled by `standard`.

    A standard without numbers (flux2) leaves the scaling to the space's own statistics.
    """
    if is_standard(space, standard, scaled, wanted):
        return numbers
    raw = to_raw(numbers, space) if scaled else numbers
    if not wanted:
        return raw
    return to_scaled(raw, space if standard.scale is None else standard)


def affine(
    space: LatentSpace, standard: LatentSpace, scaled: bool, wanted: bool
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """`to_standard` as x * scale + shift, one number for each channel, for a kernel that applies it
    on the way.

    None where nothing changes, and where the numbers are those of packed channels, which hold for
    whole 2x2 blocks alone. Raises LatentsError as `to_standard` does.
    """
    if is_standard(space, standard, scaled, wanted):
        return None
    scale, shift = [1.0] * space.channels, [0.0] * space.channels
    if scaled:
        numbers = _per_channel(space, "raw")
        if numbers is None:
            return None
        scale, shift = [1 / a for a in numbers[0]], numbers[1]
    if wanted:
        numbers = _per_channel(space if standard.scale is None else standard, "scaled")
        if numbers is None:
            return None
        triples = list(zip(scale, shift, *numbers, strict=True))
        scale = [factor * a for factor, _, a, _ in triples]
        shift = [(offset - b) * a for _, offset, a, b in triples]
    return tuple(scale), tuple(shift)


def _per_channel(space: LatentSpace, wanted: str) -> tuple[list[float], list[float]] | None:
    """Scale and shift of each channel; None where they differ within packed channels."""
    if space.scale is None or space.shift is None:
        raise _unknown(space, wanted)
    scale, shift = _numbers(space.scale), _numbers(space.shift)
    if {len(scale), len(shift)} - {1, space.channels}:
        return None
    repeat = space.channels
    return list(scale) * (repeat // len(scale)), list(shift) * (repeat // len(shift))


def _unknown(space: LatentSpace, wanted: str) -> LatentsError:
    if space.statistics_of_vae == "mean_std":
        statistics, how = "statistics", "mean_std(vae.latents_mean, vae.latents_std)"
    else:
        statistics, how = "batch-norm statistics", "batch_norm(*BatchNorm.from_vae(pipe.vae))"
    return LatentsError(
        f"space {space.name}: {wanted} latents need the {statistics} of the pipeline's VAE: give "
        f"space=LatentSpace.get('{space.name}').with_{how}"
    )


def _mapped(
    numbers: Any, space: LatentSpace, wanted: str, formula: Callable[[Any, Any, Any], Any]
) -> Any:
    scale, shift = space.scale, space.shift
    if scale is None or shift is None:
        raise _unknown(space, wanted)
    shape = tuple(numbers.shape)
    if len(shape) == 5 and space.temporal_factor > 1:
        if shape[1:3] != (space.channels, 1):
            raise LatentsError(
                f"space {space.name}: latents with an axis of frames must be [B, {space.channels}, "
                f"1, H, W], got {list(shape)}"
            )
        return _mapped(numbers.reshape(shape[:2] + shape[3:]), space, wanted, formula).reshape(
            shape
        )
    if len(shape) < 3 or shape[-3] != space.channels:
        raise LatentsError(
            f"space {space.name}: latents must be [B, {space.channels}, H, W], got {list(shape)}"
        )
    channels, patch = space.channels, space.packed_patch
    counts = [len(value) for value in (scale, shift) if isinstance(value, tuple)]
    if all(count == channels for count in counts):
        cell = (channels, 1, 1)
        return formula(numbers, _constant(scale, numbers, cell), _constant(shift, numbers, cell))
    # One number per packed channel: index c*4 + dy*2 + dx is the cell (dy, dx) of each 2x2 block
    # of channel c.
    height, width = shape[-2:]
    space.check_even(height, width)
    blocks = numbers.reshape(*shape[:-2], height // patch, patch, width // patch, patch)
    factors = [
        _constant(value, numbers, (channels, 1, patch, 1, patch))
        if isinstance(value, tuple) and len(value) == space.packed_channels
        else _constant(value, numbers, (channels, 1, 1, 1, 1))
        for value in (scale, shift)
    ]
    return formula(blocks, *factors).reshape(shape)


def _constant(value: Factors, like: Any, shape: tuple[int, ...]) -> Any:
    """Factors that broadcast; one number stays a number, which keeps it out of graphs' inputs."""
    if not isinstance(value, tuple):
        return value
    if isinstance(like, np.ndarray):
        return np.asarray(value, like.dtype).reshape(shape)
    return like.new_tensor(value).reshape(shape)


def _numbers(value: Factors | None) -> tuple[float, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _per_cell(space: LatentSpace, value: Factors) -> list[float]:
    """One number for each packed channel."""
    numbers = _numbers(value)
    return [number for number in numbers for _ in range(space.packed_channels // len(numbers))]
