"""The space and scaling of latents that do not say, from their statistics; only where certain.

Four channels. The readings are sdxl raw, sdxl scaled, sdxl as Playground 2.5 normalizes it, sd1 raw
and sd1 scaled, each with published per-channel mean and standard deviation over natural images.
One image differs from that population, so a reading is a hierarchical Gaussian: an image's channel
means scatter around the population's by MEAN_SPREAD population deviations, the logarithms of its
channel deviations by a part common to all channels (flat or busy pictures) and a part of each
channel's own. A reading is accepted when the latents are typical of it (squared Mahalanobis
distance within TYPICAL) and every other reading is at least ODDS times less likely. The spreads
are about twice those of 1,500 photographs in TAEF2's latents (means 0.29, common 0.08, own 0.14),
as the other spaces are less whitened than FLUX.2's. Tried on 1,200 such photographs carried over to
the five readings' statistics, with their means' scatter doubled: no reading was wrong; one image
was certain in 10 to 70 % of the cases, four images in 82 % or more (Playground 2.5: always asked).

32 channels, or 128 as patches of 2x2 cells. FLUX.2 is not alone with 32 (Sana's autoencoder has as
many) nor with 128 (LTX-Video's), so the strongest correlations between channels serve as a
signature.

Every other space is asked for: no published statistics tell it from one of the same shape. So is
every space of a shape that a space of the user's own has, whose statistics nobody knows.

Everything is preceded by one test: neighboring cells of a picture's latents are correlated, those
of noise are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from latentguard.errors import LatentsError
from latentguard.spaces.arrays import unpatchify
from latentguard.spaces.space import RECORDS, SCALINGS, SPACES, LatentSpace, all_spaces

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

# More images add nothing once these agree, and reading them costs time.
MAX_IMAGES = 16
# Images in one file are often variations of one prompt: more than this many are not counted as
# independent evidence.
INDEPENDENT_IMAGES = 4
# Fewer cells than 8x8 say too little about an image's statistics.
MIN_CELLS = 64
# A larger image is judged by its central 256x256 cells.
CROP = 256
# Mean lag-1 correlation over both axes and all channels: 0 +- 0.03 for noise; over 1,500
# photographs in TAEF2's latents at 32x32 cells the median is 0.51, the least 0.20.
MIN_NEIGHBOR_CORRELATION = 0.15

MEAN_SPREAD = 0.6
COMMON_SPREAD = 0.3
OWN_SPREAD = 0.25
# Within-image deviations are smaller than the population's, of which the means' scatter is a part.
LOG_OFFSET = 0.5 * math.log(1 - 0.3**2)
# 99.9 % of the chi-squared distribution with 8 degrees of freedom (4 means, 4 deviations).
TYPICAL = 26.1
ODDS = 1000.0


@dataclass(frozen=True)
class Recognition:
    """What the statistics say.

    Attributes:
        space: the space's name, or None where it is not certain.
        scaled: True or False, or None where it is not certain.
        question: what the owner of the latents must say, one sentence with the options that say
            it; empty where both are certain.
    """

    space: str | None
    scaled: bool | None
    question: str

    @property
    def certain(self) -> bool:
        """Both space and scaling are known."""
        return self.space is not None and self.scaled is not None


def recognize(
    tensor: Tensor | NDArray[Any] | Sequence[Tensor | NDArray[Any]],
    space: str | LatentSpace | None = None,
    scaled: bool | None = None,
) -> Recognition:
    """Recognize spatial latents by their statistics.

    Args:
        tensor: [C, H, W], [B, C, H, W] or a sequence of [C, H, W] (sizes may differ).
        space, scaled: what is known already; only the rest is looked for.

    Returns:
        A Recognition. It is certain only where the documented margins hold; noise, constants,
        NaN, and what fits two readings end in a question.

    Raises:
        LatentsError: the tensor is no latents at all (rank), or the given space is unknown.
    """
    known = None if space is None else LatentSpace.get(space)
    images = _images(tensor)
    channels = {image.shape[0] for image in images}
    if len(channels) != 1:
        return Recognition(None, scaled, f"images have different channels {sorted(channels)}")
    count = channels.pop()
    if known is not None and count not in _channels_of(known):
        return Recognition(
            None, scaled, f"space {known} has {known.channels} channels, the latents have {count}"
        )
    if known is not None and scaled is not None:
        return Recognition(known.name, scaled, "")
    alike = [space for space in all_spaces() if count in _channels_of(space)]
    names = [space.name for space in alike]
    if not names:
        return Recognition(None, scaled, f"no known space has {count} channels ({_channel_list()})")
    flux2 = SPACES["flux2"]
    if count == flux2.packed_channels and (known is None or known.name == "flux2"):
        images = [unpatchify(image[None], flux2)[0] for image in images]
    doubt = _not_a_picture(images)
    own = [space.name for space in alike if space.name not in RECORDS]
    if doubt is None and known is None and own:
        doubt = f"space {own[0]} has the same shape, and nothing is known of its statistics"
    told = {name for name in names if SPACES[name].mean is not None} | {"flux2"}
    told -= set(own)
    if doubt is not None or not told.intersection(names if known is None else [known.name]):
        return _ask(known, scaled, names, doubt)
    if flux2 in alike:
        return _flux2(images, known, scaled, names)
    return _decide(images, known, scaled, names)


def _channels_of(space: LatentSpace) -> tuple[int, ...]:
    """Channels that an image [C, H, W] of a space may have: those of cells, and of FLUX.2's
    patches, which are kept as such."""
    if space.statistics_of_vae == "batch_norm":
        return space.channels, space.packed_channels
    return (space.channels,)


def _images(tensor: Any) -> list[Array]:
    if hasattr(tensor, "ndim") and tensor.ndim not in (3, 4):
        raise LatentsError(f"latents must be [B, C, H, W] or [C, H, W], got {list(tensor.shape)}")
    items = [tensor] if getattr(tensor, "ndim", 0) == 3 else list(tensor)
    images = []
    for item in items[:MAX_IMAGES]:
        if item.ndim != 3 or 0 in item.shape:
            raise LatentsError(f"an image's latents must be [C, H, W], got {list(item.shape)}")
        top, left = (max(0, (size - CROP) // 2) for size in item.shape[1:])
        images.append(_doubles(item[:, top : top + CROP, left : left + CROP]))
    if not images:
        raise LatentsError("there are no latents to recognize")
    return images


def _doubles(image: Any) -> Array:
    if isinstance(image, np.ndarray):
        return image.astype(np.float64)
    array: Array = image.detach().cpu().double().numpy()
    return array


def _not_a_picture(images: list[Array]) -> str | None:
    """Why no statistics can be trusted, or None."""
    if not all(np.isfinite(image).all() for image in images):
        return "the latents hold NaN or Inf"
    if any(image[0].size < MIN_CELLS for image in images):
        return f"fewer than {MIN_CELLS} cells say too little"
    if any((image.std(axis=(1, 2)) < 1e-6 * (1 + abs(image).max())).any() for image in images):
        return "a channel is constant"
    correlation = float(np.mean([_neighbor_correlation(image) for image in images]))
    if correlation < MIN_NEIGHBOR_CORRELATION:
        return (
            f"neighboring cells are not correlated ({correlation:.2f}, a picture's latents have "
            f"at least {MIN_NEIGHBOR_CORRELATION}), so these look like noise"
        )
    return None


def _neighbor_correlation(image: Array) -> float:
    z = (image - image.mean(axis=(1, 2), keepdims=True)) / image.std(axis=(1, 2), keepdims=True)
    pairs = [z[:, 1:] * z[:, :-1], z[:, :, 1:] * z[:, :, :-1]]
    return float(np.mean([pair.mean() for pair in pairs if pair.size]))


# -- four channels ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    label: str
    name: str
    scaled: bool | None  # None: scaled in another way than the space that would be settled
    mean: Array
    std: Array

    def log_likelihood(self, images: list[Array]) -> tuple[float, float]:
        """Log-likelihood of the images' mean features, and their squared Mahalanobis distance."""
        means = np.mean([image.mean(axis=(1, 2)) for image in images], axis=0)
        logs = np.mean([np.log(image.std(axis=(1, 2))) for image in images], axis=0)
        count = min(len(images), INDEPENDENT_IMAGES)
        channels = len(self.mean)
        mean_z = (means - self.mean) / (MEAN_SPREAD * self.std)
        log_residual = logs - np.log(self.std) - LOG_OFFSET
        covariance = OWN_SPREAD**2 * np.eye(channels) + COMMON_SPREAD**2
        distance = mean_z @ mean_z + log_residual @ np.linalg.solve(covariance, log_residual)
        # The covariance of the logs is every reading's: only the means' scale differs.
        log_norm = float(np.log(self.std).sum())
        return float(-0.5 * count * distance - log_norm), float(count * distance)


def _four_channel_readings(known: LatentSpace | None) -> list[_Reading]:
    """Every published reading; of a space that is given, those of that space.

    Where the given space has a scaling of its own, "scaled" means by that one, and the published
    ones are only what else the latents may be.
    """
    published = [
        (name, space)
        for name, space in (SPACES | SCALINGS).items()
        if space.channels == 4
        and space.mean is not None
        and (known is None or space.name == known.name)
    ]
    readings = [
        _reading(f"{name} raw", SPACES[name], False)
        for name in dict.fromkeys(space.name for _, space in published)
    ]
    if known is not None:
        readings.append(_reading(f"{known} scaled as given", known, True))
    for name, space in published:
        if known is None or not space.is_scaled_as(known):
            usual = known is None and name in SPACES
            readings.append(_reading(f"{name} scaled", space, True if usual else None))
    return readings


def _reading(label: str, space: LatentSpace, scaled: bool | None) -> _Reading:
    mean, std = np.array(SPACES[space.name].mean), np.array(SPACES[space.name].std)
    if scaled is False:
        return _Reading(label, space.name, scaled, mean, std)
    scale, shift = np.array(space.scale), np.array(space.shift)
    return _Reading(label, space.name, scaled, (mean - shift) * scale, std * scale)


def _decide(
    images: list[Array],
    known: LatentSpace | None,
    scaled: bool | None,
    names: list[str],
) -> Recognition:
    candidates = [
        reading
        for reading in _four_channel_readings(known)
        if scaled is None or reading.scaled in (scaled, None)
    ]
    scored = sorted(
        ((*reading.log_likelihood(images), reading) for reading in candidates),
        key=lambda item: item[0],
        reverse=True,
    )
    best, distance, winner = scored[0]
    margin = best - max(score for score, _, _ in scored[1:])
    fits = f"statistics fit {winner.label} best"
    if distance > TYPICAL:
        return _ask(known, scaled, names, "the statistics fit no known reading")
    if margin < math.log(ODDS):
        rival = scored[1][2]
        return _ask(known, scaled, names, f"{fits}, but {rival.label} is not ruled out")
    if winner.scaled is None:
        return _ask(known, scaled, names, f"{fits}, a scaling that has to be given")
    return Recognition(winner.name, winner.scaled, "")


# -- 32 channels -----------------------------------------------------------------------------

# The strongest correlations within an image between channels (a, b, sign): measured on 1,500
# photographs encoded by TAEF2, whose channels are FLUX.2's. Their mean signed correlation there is
# 0.39 (median), 0.18 (lowest percent), 0.05 (least); with the channels shuffled, as another space
# would have it, 0.00 on average.
_FLUX2_SIGNATURE = (
    (15, 19, 1),
    (3, 8, -1),
    (15, 29, 1),
    (24, 26, -1),
    (5, 18, 1),
    (30, 31, 1),
    (15, 21, 1),
    (3, 27, -1),
    (8, 27, 1),
    (19, 29, 1),
    (10, 25, -1),
    (22, 30, 1),
    (0, 15, 1),
    (19, 21, 1),
    (0, 19, 1),
    (7, 18, -1),
)
MIN_SIGNATURE = 0.25
# Where all channels show one pattern, as of a picture of two flat halves, they correlate in any
# space, and 16 random signs reach that too often. So the signature has to stand out of what 16
# random pairs of the same channels would give, as a multiple of their deviation: 3.8 and more in
# the 445 of 500 photographs that have it; at most 4 where all correlations are 1.
MIN_PROMINENCE = 3.75
# The level is the geometric mean, over the channels that TAEF2 reproduces at full strength, of the
# 99 % quantile of the absolute value: it hardly depends on how much of a picture is flat. Scaled,
# over 2,500 photographs and drawings: median 2.37, 1.66 to 2.71. Raw is 1.75 times that (the
# batch-norm deviations are 1.70 to 1.86, as given in leejet/stable-diffusion.cpp's
# src/auto_encoder_kl.hpp): 2.91 to 4.75. What lies between the two intervals is not certain.
_FLUX2_STRONG = (1, 2, 3, 5, 8, 15, 19, 24, 26, 29, 31)
FLUX2_SCALED_LEVEL = (1.5, 2.8)
FLUX2_RAW_LEVEL = (3.0, 5.5)


def _flux2(
    images: list[Array], known: LatentSpace | None, scaled: bool | None, names: list[str]
) -> Recognition:
    flux2 = SPACES["flux2"]
    if known is None:
        signature = float(np.mean([_signature(image) for image in images]))
        prominence = float(np.mean([_prominence(image) for image in images]))
        if signature < MIN_SIGNATURE or prominence < MIN_PROMINENCE:
            return _ask(
                known,
                scaled,
                names,
                f"the correlations between channels are not certainly FLUX.2's ({signature:.2f}, "
                f"certain is {MIN_SIGNATURE}, which stands out {prominence:.1f} times, certain is "
                f"{MIN_PROMINENCE})",
            )
    if scaled is not None:
        return Recognition("flux2", scaled, "")
    strong = list(_FLUX2_STRONG)
    quantiles = [np.quantile(abs(image[strong]), 0.99, axis=(1, 2)) for image in images]
    level = math.exp(float(np.mean(np.log(quantiles))))
    for reading, (low, high) in ((True, FLUX2_SCALED_LEVEL), (False, FLUX2_RAW_LEVEL)):
        if low <= level <= high:
            return Recognition("flux2", reading, "")
    doubt = f"an amplitude of {level:.2f} fits neither scaled nor raw flux2 latents with certainty"
    return _ask(flux2, scaled, ["flux2"], doubt)


def _signature(image: Array) -> float:
    z = (image - image.mean(axis=(1, 2), keepdims=True)) / image.std(axis=(1, 2), keepdims=True)
    return float(np.mean([sign * (z[a] * z[b]).mean() for a, b, sign in _FLUX2_SIGNATURE]))


def _prominence(image: Array) -> float:
    """The signature as a multiple of its deviation over random pairs and signs of channels."""
    z = image.reshape(len(image), -1)
    z = (z - z.mean(axis=1, keepdims=True)) / z.std(axis=1, keepdims=True)
    correlations = z @ z.T / z.shape[1]
    pairs = correlations[~np.eye(len(z), dtype=bool)]
    typical = math.sqrt(float(np.mean(pairs**2)))
    return _signature(image) * math.sqrt(len(_FLUX2_SIGNATURE)) / max(typical, 1e-12)


# -- questions -------------------------------------------------------------------------------


def _ask(
    known: LatentSpace | None, scaled: bool | None, names: list[str], doubt: str | None
) -> Recognition:
    """What is missing, as options of the command line, after the reason for asking."""
    asks = []
    if known is None:
        asks.append(" or ".join(f"--space {name}" for name in names))
    if scaled is None:
        asks.append("--scaled or --unscaled")
    if doubt is None:
        doubt = (
            _alike(names)
            if known is None
            else f"no published statistics tell scaled from raw {known} latents"
        )
    space = None if known is None else known.name
    return Recognition(space, scaled, f"{doubt}: say {' and '.join(asks)}")


def _alike(names: list[str]) -> str:
    if len(names) == 1:
        return f"no published statistics tell that these are {names[0]} latents"
    shown = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{shown} have the same shape, and no published statistics tell which"


def _channel_list() -> str:
    return ", ".join(f"{space.name} {space.channels}" for space in SPACES.values())
