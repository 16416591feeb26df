"""Thresholds at chosen false-positive rates, with a guarantee that holds for any finite sample.

Split conformal calibration (Vovk, Gammerman and Shafer 2005; Lei et al. 2018): of the margins of n
harmless images take the ceil((n + 1)(1 - a))-th smallest. A further image from the same source is
above it with probability at most a, whatever the scores' distribution, on average over calibration
sets. A match is a margin at or above the threshold, so the threshold is the next number above.

Reading order: conformal.threshold (one number) -> measure (margins of files, by noise level) or
trajectories.read_trajectories (of a guard's records) -> entries and merge (the lock).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latentguard.errors import LatentsError, ModelError
from latentguard.judge import PURE_NOISE
from latentguard.policy import CalibratedMargin, Lock, LockEntry, Policy, load_policy

if TYPE_CHECKING:
    from latentguard.encoders import Encoder
    from latentguard.evaluate.estimates import Denoise

ESTIMATES = ("none", "wiener")
SPECTRUM_SHARE = 2
"""With the Wiener estimate one image in so many gives the spectrum, the others calibrate."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Margins:
    """Margins of harmless images under a policy, by concept and noise level.

    model: (name, sha256) of the encoder. space: of the latents.
    values: concept id -> noise level -> [n] float64, one margin for each image.
    source: what was measured, for people.
    """

    model: tuple[str, str]
    space: str
    values: Mapping[str, Mapping[float, Array]]
    source: str


def images_needed(fpr: float) -> int:
    """The fewest images from which a threshold for the rate can be had: ceil(1 / fpr) - 1."""
    return math.ceil(1 / Fraction(repr(float(fpr)))) - 1


def threshold(margins: ArrayLike, fpr: float) -> float:
    """The lowest margin that a further image reaches with probability at most `fpr`.

    margins: [n] of harmless images, exchangeable with those to come; float32 scores as float64 are
        fine. Ties count against the image, so they keep the guarantee.

    Raises:
        ValueError: a rate outside of 0 to 1 or too small for n, scores that are not finite, or
            margins so high that no threshold is above them.
    """
    values = np.asarray(margins, np.float64)
    if not 0 < fpr < 1:
        raise ValueError(f"a false-positive rate must be above 0 and below 1, got {fpr:g}")
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("margins must be finite numbers [n]")
    n = len(values)
    # Exactly: (n + 1) * (1 - 0.1) in floats is above a whole number for some n.
    rank = math.ceil((n + 1) * (1 - Fraction(repr(float(fpr)))))
    if rank > n:
        raise ValueError(
            f"a false-positive rate of {fpr:g} needs at least {images_needed(fpr):,} images, "
            f"got {n:,}"
        )
    order = float(np.partition(values, rank - 1)[rank - 1])
    # The next float32: scores are float32, and the lock's decimal is to be read alike everywhere.
    above = np.float32(order)
    while float(above) <= order:
        above = np.nextafter(above, np.float32(np.inf))
    if above > 2:
        raise ValueError(f"no threshold is above a margin of {order:g}: margins end at 2")
    return float(above)


def measure(
    paths: Sequence[str | Path],
    policy: Policy | str | Path,
    model: Encoder | str | Path = "auto",
    *,
    noise_levels: Sequence[float] = (0.0,),
    estimate: str = "none",
    space: str | None = None,
    scaled: bool | None = None,
    batch_size: int = 16,
    device: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Margins:
    """Margins of harmless latents, noised forward to each level.

    Args:
        paths: latents files, folders or shards; every image counts.
        policy, model, device: as for `Scorer`. One model is measured, whatever `cascade` says.
        noise_levels: noise-to-signal ratios, 0 is the image as it is.
        estimate: what is scored at a level r above 0. "none": x_t itself, as variance-preserving
            schedules have it, (x0 + r noise) / sqrt(1 + r^2). "wiener": the Wiener estimate of x0,
            from the spectrum of every second image; the others calibrate.
        seed: of the noise; every image and level has noise of its own.
        progress: called with images scored and their number, levels counted apart.

    Raises:
        LatentsError: an unreadable image, images of several spaces, raw latents whose scaling is
            not known, or with "wiener" images of several sizes.
        PolicyError, ModelError: as for `Scorer`.
    """
    import torch

    from latentguard.evaluate.estimates import Wiener, add_noise, unit_variance
    from latentguard.evaluate.reading import batches
    from latentguard.scorer import Scorer
    from latentguard.spaces import Latents

    levels = _levels(noise_levels)
    if estimate not in ESTIMATES:
        raise ModelError(f"estimate must be one of {', '.join(ESTIMATES)}, got {estimate!r}")
    read = [
        part.to_spatial() if max(levels) == 0 else part.to_spatial().to_scaled()
        for part in batches(paths, space, scaled, batch_size)
    ]
    kept = list(read)
    denoise: Denoise | None = None
    if estimate == "wiener" and max(levels) > 0:
        whole = _one_size(read)
        if len(whole) < 2 * SPECTRUM_SHARE:
            raise LatentsError(f"the Wiener estimate needs at least 4 images, got {len(whole)}")
        denoise = Wiener.fit(whole[::SPECTRUM_SHARE])
        rest = whole[torch.arange(len(whole)) % SPECTRUM_SHARE != 0]
        kept = [Latents(part, read[0].space, True) for part in rest.split(batch_size)]
    alone = load_policy(policy).model_copy(update={"cascade": None})
    scorer = Scorer(alone, model, space=kept[0].space.name, device=device)
    count = sum(map(len, kept))
    margins = {level: [] for level in levels}  # type: dict[float, list[Array]]
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for level in levels:
        for part in kept:
            tensor = part.tensor
            if level > 0:
                noisy = add_noise(tensor.cpu(), level, generator)
                tensor = denoise(noisy, level) if denoise else unit_variance(noisy, level)
            with torch.inference_mode():
                scores = scorer.score(Latents(tensor, part.space, part.scaled), level)
            found = scores.margin.cpu().double().numpy()
            if not np.isfinite(found).all():
                raise ModelError(
                    f"model {scorer.encoder.name} gave margins that are not finite at noise "
                    f"level {level:g}"
                )
            margins[level].append(found)
            done += len(part)
            progress(done, count * len(levels))
    stacked = {level: np.concatenate(parts) for level, parts in margins.items()}
    seen = [
        (index, concept.id)
        for index, (concept, covered) in enumerate(
            zip(scorer.policy.concepts, scorer.bank.covered, strict=True)
        )
        if covered
    ]
    encoder = scorer.encoder
    scored = "x_t" if denoise is None else "their Wiener estimate"
    return Margins(
        (encoder.name, encoder.sha256),
        encoder.space,
        {concept: {level: stacked[level][:, index] for level in levels} for index, concept in seen},
        f"{count:,} images" if max(levels) == 0 else f"{count:,} images, noised, {scored}",
    )


@dataclass(frozen=True)
class Row:
    """A threshold for people: of one concept and noise level at one rate, from n images."""

    concept: str
    noise_level: float
    fpr: float
    margin: float
    images: int


def entries(policy: Policy, margins: Margins, rates: Iterable[float]) -> list[LockEntry]:
    """Lock entries with a margin for each rate, for each concept and noise level measured.

    Raises ModelError where a rate is too small for the number of images, or a concept is not the
    policy's.
    """
    wanted = sorted(set(rates))
    if not wanted:
        raise ModelError("calibration needs at least one false-positive rate")
    concepts = {concept.id: concept for concept in policy.concepts}
    found = []
    for name, by_level in margins.values.items():
        if name not in concepts:
            raise ModelError(
                f"policy '{policy.name}' has no concept {name!r}: it has {', '.join(concepts)}"
            )
        for level, values in sorted(by_level.items()):
            try:
                calibrated = tuple(
                    CalibratedMargin(fpr=rate, margin=threshold(values, rate)) for rate in wanted
                )
            except ValueError as error:
                raise ModelError(f"concept '{name}' at noise level {level:g}: {error}") from error
            found.append(
                LockEntry(
                    model=margins.model[0],
                    model_sha256=margins.model[1],
                    space=margins.space,
                    noise_level=level,
                    concept=name,
                    prompts_sha256=policy.prompts_sha256(concepts[name]),
                    margins=calibrated,
                    calibrated_on=margins.source,
                )
            )
    return found


def merge(lock: Lock | None, policy: Policy, new: Sequence[LockEntry]) -> Lock:
    """A lock with the new entries and what is still right of the old ones.

    New entries replace all old ones of the same model, space and concept, whatever their noise
    levels: thresholds of two calibrations do not mix. Old entries of concepts that the policy no
    longer has, or has with other prompts, are dropped.
    """
    replaced = {(e.model, e.model_sha256, e.space, e.concept) for e in new}
    prompts = {concept.id: policy.prompts_sha256(concept) for concept in policy.concepts}
    kept = [
        entry
        for entry in (lock.entries if lock else ())
        if (entry.model, entry.model_sha256, entry.space, entry.concept) not in replaced
        and prompts.get(entry.concept) == entry.prompts_sha256
    ]
    return Lock(schema_version=1, entries=(*kept, *new))


def rows(new: Sequence[LockEntry], margins: Margins) -> list[Row]:
    """What the entries hold, a threshold a row."""
    return [
        Row(
            entry.concept,
            entry.noise_level,
            item.fpr,
            item.margin,
            len(margins.values[entry.concept][entry.noise_level]),
        )
        for entry in new
        for item in entry.margins
    ]


def _levels(noise_levels: Sequence[float]) -> list[float]:
    levels = sorted({float(level) for level in noise_levels})
    if not levels or not all(0 <= level <= PURE_NOISE for level in levels):
        given = ", ".join(f"{level:g}" for level in noise_levels) or "none"
        raise ModelError(f"noise levels must be 0 to 1e6, and at least one, got {given}")
    return levels


def _one_size(read: Sequence[Any]) -> Any:
    import torch

    sizes = {tuple(part.tensor.shape[1:]) for part in read}
    if len(sizes) > 1:
        raise LatentsError(
            "the Wiener estimate needs images of one size, got "
            + ", ".join("x".join(map(str, size)) for size in sorted(sizes))
        )
    return torch.cat([part.tensor.float() for part in read])
