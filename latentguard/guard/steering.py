"""Steering: what a flagged image matched by is faded out of its prediction, step by step.

For latents x = alpha * x0 + sigma * noise and a prediction of x0, the gradient of the matched
concepts' margins (their probabilities grow with them) with respect to x0 says where in the image
the concept is. There x0 is faded to the mean of what is around, in bounded steps, until the concept
is under its threshold, and alpha times the way that it went is added to x, which keeps the
predicted noise as it is (the manifold-preserving form of guidance: no gradient goes through the
denoiser; compare He et al., arXiv 2311.16424).

Why not along the gradient itself: it finds what fools the encoder, and not what another image would
look like. On photos of revolvers a step against the raw gradient did not move x0 from that class to
the others at all; averaged over noised copies and low-pass filtered, it did so 7 to 12 times less
than a step of the same size along the difference of the class means; fading does 5 times less, and
that with one gradient (benchmarks/guard.py directions).
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
"""Share of what is left of the matched content that one step fades."""
CARRY = 4.0
"""The way that x0 goes is added to the latents as often as this at strength 1, times the share by
which the noise level falls at the step. To the sampler a push is noise, of which it takes as much
away as of the noise: so what all pushes leave does not depend on the number of steps."""
GROWN = 4.0
"""A push grows with the share of the noise that is gone since its image was flagged first, up to
this: what comes back needs more."""
BLUR = 16
"""The side of an image divided by the radius within which a gradient says where a concept is."""
RELEASE = 1.0
"""How far below its threshold a steered concept has to stay, in logits, from the first steering to
the end: an image must not settle just below what flagged it."""


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
            latents: [B, ...] to be moved; x0: the clean estimate, of the same shape.
            concepts: the ids that each image is to be moved away from.
            noise_level: of the latents that x0 was predicted from.
            alpha: factor of x0 in `latents`.
            after: noise level of `latents`; None for a push of its full size.
            since: noise levels at which the images were flagged first; now where it is empty.

        Returns: the moved latents, float32, each with the norm that it had, and what was done;
        None for an image that was under its thresholds, which keeps its numbers.
        """
        # The pipeline may run in inference mode, where nothing can have a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            return self._steer(latents, x0, concepts, noise_level, alpha, after, since)

    def thresholds(self, concepts: Sequence[set[str]], noise_level: float) -> Tensor:
        """The margins [B, K] under which steered images have to come, inf for other concepts."""
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
        """Of each image that was steered and is not under its thresholds, which it is, in words."""
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
        """What was done with each image, told by the concept furthest above its threshold."""
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
    """Where the gradient [B, C, H, W] is large, [B, 1, H, W], 0 to 1."""
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
    """The mean of x [B, C, H, W] outside of the mask, [B, C, 1, 1]."""
    weight = 1 - mask
    total: Tensor = (x * weight).sum((2, 3), keepdim=True)
    return total / weight.sum((2, 3), keepdim=True).clamp_min(1e-6)


def _fall(before: float, after: float) -> float:
    """The share by which a noise level falls."""
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
    """x with the norm of `like`, image by image: a sampler expects it at its noise level."""
    return _unit(x) * _rms(like)
