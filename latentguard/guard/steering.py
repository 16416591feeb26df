"""Steering: fade what a flagged image matched by out of its prediction, step by step.

Latents are x = alpha * x0 + sigma * noise, with a prediction of x0. The gradient of the matched
concepts' margins with respect to x0 says where in the image the concept is. There x0 is faded to
the mean of the rest of the image, in bounded steps, until the concept is under its threshold. The
way that x0 went is then added to x, times alpha and a factor (CARRY, GROWN), and x gets its norm
back. No gradient goes through the denoiser, as in the manifold-preserving form of guidance (He et
al., arXiv 2311.16424).

Why not along the gradient itself: it finds what fools the encoder, and not what another image would
look like. On photos of revolvers a step against the raw gradient hardly moved x0 from that class to
the others. With gradients averaged over noised copies and low-pass filtered, it moved 7 to 12 times
less than a step of the same size along the difference of the class means. Fading moves 5 times
less, and needs only one gradient (benchmarks/guard.py directions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.guard.record import Steering
from latentguard.scorer import Scorer
from latentguard.spaces import Latents

FADE = 0.5
"""Share of the way to the mean of the rest that one step takes where the mask is 1."""
CARRY = 4.0
"""At strength 1 the way that x0 goes is added to the latents times this, and times the share by
which the noise level falls at the step. The sampler treats a push as noise and removes the same
share of it as of the noise, so what all pushes leave does not depend on the number of steps."""
GROWN = 4.0
"""A push grows by the factor by which the noise level has fallen since the image was flagged first,
at most by this: a concept that comes back needs a larger push."""
BLUR = 16
"""The longer side of an image divided by the deviation of the Gaussian that blurs the energy of the
gradient, so that it covers a region and not single cells."""
RELEASE = 1.0
"""How far below its threshold a steered concept has to stay, in logits, from the first steering to
the end. So an image cannot settle just below the threshold that flagged it."""


class Steerer:
    """Moves batches of flagged latents. Keeps nothing between calls.

    scorer: policy and encoder; each concept's `steer` says how strongly and how often.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._concepts = scorer.rules.concepts

    def __call__(
        self,
        latents: Latents,
        x0: Latents,
        concepts: Sequence[set[str]],
        noise_level: float,
        alpha: float,
        after: float | None = None,
        since: Sequence[float] = (),
    ) -> tuple[Tensor, list[Steering | None]]:
        """Steer a batch.

        Args:
            latents: [B, C, H, W], patches or packed tokens, to be moved.
            x0: the clean estimates of the same images, in either layout.
            concepts: for each image the ids of the concepts to move it away from.
            noise_level: of the latents from which x0 was predicted.
            alpha: factor of x0 in `latents`.
            after: noise level of `latents`; None pushes as if the noise level fell to 0.
            since: for each image the noise level at which it was flagged first; empty means now.

        Returns:
            The moved latents, float32, each with the norm that it had, and for each image what was
            done. That is None for an image that was under its thresholds; it keeps its numbers.
        """
        # The pipeline may run in inference mode, where nothing can have a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            return self._steer(latents, x0, concepts, noise_level, alpha, after, since)

    def thresholds(self, concepts: Sequence[set[str]], noise_level: float) -> Tensor:
        """The margins [B, K] under which steered images have to stay, inf for other concepts."""
        wanted = set().union(*concepts)
        thresholds = [
            self._scorer.bound.threshold(k, noise_level) if rule.id in wanted else math.inf
            for k, rule in enumerate(self._concepts)
        ]
        asked = self._asked(concepts)
        release = RELEASE / self._scorer.encoder.logit_scale
        found = torch.tensor(thresholds).expand(asked.shape) - release
        return found.masked_fill(~asked, math.inf)

    def above(
        self, latents: Latents, concepts: Sequence[set[str]], noise_level: float
    ) -> list[str | None]:
        """For each image a sentence on the concept that is over its threshold, None if none is."""
        thresholds = self.thresholds(concepts, noise_level)
        with torch.inference_mode():
            margins = self._scorer.score(latents, noise_level).margin.float().cpu()
        found: list[str | None] = []
        for row, threshold in zip(margins, thresholds, strict=True):
            k = int((row - threshold).argmax())
            found.append(
                f"concept '{self._concepts[k].id}' was steered away from, and its "
                f"margin of {row[k]:.3f} is not under {threshold[k]:.3f}, where it was to come"
                if row[k] > threshold[k]
                else None
            )
        return found

    def _steer(
        self,
        latents: Latents,
        x0: Latents,
        concepts: Sequence[set[str]],
        noise_level: float,
        alpha: float,
        after: float | None,
        since: Sequence[float],
    ) -> tuple[Tensor, list[Steering | None]]:
        x0 = x0.to_spatial()
        start = x0.tensor.detach().clone().float()
        device = start.device
        thresholds = self.thresholds(concepts, noise_level).to(device)
        strengths = torch.tensor([r.steer.strength if r.steer else 0.0 for r in self._concepts])
        weights = (strengths * self._asked(concepts)).to(device)
        iterations = self._iterations(concepts, device)
        moving = start.clone()
        first: Tensor | None = None
        taken = torch.zeros(len(start), dtype=torch.int64, device=device)
        for iteration in range(int(iterations.max()) + 1):
            moving.requires_grad_(True)
            margins = self._scorer.score(Latents(moving, x0.space, x0.scaled)).margin
            last = margins.detach()
            first = last if first is None else first
            above = (last > thresholds).any(1) & (iteration < iterations)
            if not above.any():
                break
            excess = torch.relu(margins - thresholds) * weights
            (gradient,) = torch.autograd.grad(excess.sum(), moving)
            moving = moving.detach()
            mask = _where(gradient)
            faded = torch.lerp(moving, _around(moving, mask), FADE * mask)
            moving = torch.where(_per_image(above, moving), faded, moving)
            taken += above
        assert first is not None
        given = latents.tensor.detach().clone().float()
        carry = CARRY * weights.amax(1) * (1.0 if after is None else _fall(noise_level, after))
        if since and noise_level > 0 and not math.isinf(noise_level):
            risen = torch.tensor(since, device=device) / noise_level
            carry = carry * risen.clamp(1.0, GROWN)
        way = Latents(moving.detach() - start, x0.space, x0.scaled)
        if latents.layout == "packed":
            way = way.to_packed()
        elif latents.layout == "patches":
            patches = way.space.patchify(way.tensor)
            way = Latents(patches, way.space, way.scaled, latents.layout)
        moved = given + alpha * _per_image(carry, given) * way.tensor
        moved = torch.where(_per_image(taken > 0, given), _same_norm(moved, given), given)
        return moved, self._records(thresholds, first, last, taken)

    def _asked(self, concepts: Sequence[set[str]]) -> Tensor:
        ids = self._scorer.rules.ids
        return torch.tensor([[name in names for name in ids] for names in concepts])

    def _iterations(self, concepts: Sequence[set[str]], device: torch.device) -> Tensor:
        """How many steps each image may take, [B]."""
        allowed = {rule.id: rule.steer.iterations for rule in self._concepts if rule.steer}
        return torch.tensor([max(allowed[name] for name in names) for names in concepts]).to(device)

    def _records(
        self, thresholds: Tensor, first: Tensor, last: Tensor, taken: Tensor
    ) -> list[Steering | None]:
        """What was done with each image, by the concept that was furthest above its threshold."""
        worst = (first - thresholds).argmax(1, keepdim=True)
        rows = zip(
            worst[:, 0].tolist(),
            taken.tolist(),
            first.gather(1, worst)[:, 0].tolist(),
            last.gather(1, worst)[:, 0].tolist(),
            (last <= thresholds).all(1).tolist(),
            strict=True,
        )
        return [
            Steering(self._concepts[k].id, count, a, b, done) if count else None
            for k, count, a, b, done in rows
        ]


def _where(gradient: Tensor) -> Tensor:
    """Mask [B, 1, H, W] from 0 to 1 of the places where the gradient [B, C, H, W] is large."""
    energy = gradient.square().sum(1, keepdim=True)
    for axis in (2, 3):
        radius = max(energy.shape[2:]) / BLUR
        reach = math.ceil(2 * radius)
        offsets = torch.arange(-reach, reach + 1, device=gradient.device)
        kernel = torch.exp(-0.5 * (offsets / radius).square())
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        padding = (reach, 0) if axis == 2 else (0, reach)
        energy = F.conv2d(energy, kernel.view(shape), padding=padding)
    largest = energy.amax((2, 3), keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    return (energy / largest).sqrt()


def _around(x: Tensor, mask: Tensor) -> Tensor:
    """The mean [B, C, 1, 1] of x [B, C, H, W], weighted by 1 - mask."""
    weight = 1 - mask
    total: Tensor = (x * weight).sum((2, 3), keepdim=True)
    return total / weight.sum((2, 3), keepdim=True).clamp_min(1e-6)


def _fall(before: float, after: float) -> float:
    """The share by which the noise level falls, 0 to 1; 1 from pure noise."""
    if math.isinf(before) or before <= 0:
        return 1.0
    return max(0.0, 1 - after / before)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _rms(x: Tensor) -> Tensor:
    return _per_image(x.flatten(1).square().mean(1).sqrt(), x)


def _unit(x: Tensor) -> Tensor:
    """Each image with a root mean square of 1; zero stays zero."""
    return x / _rms(x).clamp_min(torch.finfo(x.dtype).tiny)


def _same_norm(x: Tensor, like: Tensor) -> Tensor:
    """x with the norm of `like`, image by image: the sampler expects it at this noise level."""
    return _unit(x) * _rms(like)
