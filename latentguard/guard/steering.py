"""Steering: latents moved away from the concepts that they match, by the gradient of the score.

For latents x = alpha * x0 + sigma * noise and a prediction of x0, the gradient of the matched
concepts' margins (their probabilities grow with them) with respect to x0 says where x0 should not
be. x0 takes bounded steps against it, and alpha times the way it went is added to x, which keeps
the predicted noise as it is (the manifold-preserving form of guidance: no gradient goes through the
denoiser; compare He et al., arXiv 2311.16424).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentguard.guard.record import Steering
from latentguard.scorer import Scorer
from latentguard.spaces import Latents
from latentguard.verdict import resolve_threshold

STEP = 1.0
"""Root mean square of one step at strength 1, in units of what the noise leaves open.

Measured on generations of known outcome (benchmarks/guard.py): a fifth of it moves the score but
not the image, four times as much leaves the images on which the model was trained.
"""
GROWTH, GROWN = 1.25, 4.0
"""What a step grows by with each denoising step at which its image was steered before, and how far:
what comes back needs more, and schedulers differ in how many steps they leave for it."""
SLACK = 0.02
"""How far below its threshold a margin has to come, so that rounding does not flag it again."""


class Steerer:
    """Moves batches of flagged latents. Keeps nothing between calls.

    scorer: policy and encoder; each concept's `steer` says how strongly and how often.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._plain = scorer.plain

    def __call__(
        self,
        latents: Latents,
        x0: Latents,
        concepts: Sequence[set[str]],
        noise_level: float,
        alpha: float,
        before: Sequence[int] = (),
    ) -> tuple[Tensor, list[Steering]]:
        """Steer a batch.

        Args:
            latents: [B, ...] to be moved; x0: the clean estimate, of the same shape.
            concepts: the ids that each image is to be moved away from.
            noise_level: of the latents that x0 was predicted from.
            alpha: factor of x0 in `latents`.
            before: at how many steps each image was steered already; none where it is empty.

        Returns: the moved latents, float32, each with the norm that it had, and what was done.
        """
        # The pipeline may run in inference mode, where nothing can have a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            return self._steer(latents, x0, concepts, noise_level, alpha, before)

    def _steer(
        self,
        latents: Latents,
        x0: Latents,
        concepts: Sequence[set[str]],
        noise_level: float,
        alpha: float,
        before: Sequence[int],
    ) -> tuple[Tensor, list[Steering]]:
        start = x0.tensor.detach().clone().float()
        weights, limits = self._targets(concepts, noise_level, start.device)
        iterations = self._iterations(concepts, start.device)
        # What is still open at this noise level: the deviation of x0 given x, for data of unit
        # deviation and a linear denoiser.
        spread = 1.0 if math.isinf(noise_level) else noise_level / math.hypot(1.0, noise_level)
        growth = torch.tensor([GROWTH**count for count in before or [0] * len(start)])
        length = STEP * spread * growth.clamp(max=GROWN).to(start) * weights.amax(1)
        moving = start.clone()
        first: Tensor | None = None
        taken = torch.zeros(len(start), dtype=torch.int64, device=start.device)
        for iteration in range(int(iterations.max()) + 1):
            moving.requires_grad_(True)
            margin = self._margin(x0, moving)
            first = margin.detach() if first is None else first
            excess = torch.relu(margin - limits) * weights
            above = ((margin.detach() > limits) & (weights > 0)).any(1) & (iteration < iterations)
            if not above.any():
                break
            (gradient,) = torch.autograd.grad(excess.sum(), moving)
            moving = moving.detach() - _per_image(length * above, moving) * _unit(gradient)
            taken += above
        last = margin.detach()
        assert first is not None
        given = latents.tensor.detach().clone().float()
        moved = _same_norm(given + alpha * (moving.detach() - start), given)
        return moved, self._records(weights, limits, first, last, taken)

    def _margin(self, like: Latents, tensor: Tensor) -> Tensor:
        batch = Latents(tensor, like.space, like.scaled, like.layout, like.height, like.width)
        return self._scorer.score(batch).margin

    def _targets(
        self, concepts: Sequence[set[str]], noise_level: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Strengths [B, K], 0 where a concept is not steered, and margins [B, K] to come under."""
        encoder = self._scorer.encoder
        strengths, limits = [], []
        wanted = set().union(*concepts)
        for concept in self._plain["concepts"]:
            asked = concept["id"] in wanted
            strengths.append(concept["steer"]["strength"] if asked else 0.0)
            limit = math.inf
            if asked:
                model = (encoder.name, encoder.sha256)
                limit = resolve_threshold(
                    concept,
                    self._plain,
                    model,
                    encoder.space,
                    noise_level,
                    logit_scale=encoder.logit_scale,
                )
            limits.append(limit - SLACK)
        ids = [concept["id"] for concept in self._plain["concepts"]]
        mask = torch.tensor([[name in names for name in ids] for names in concepts])
        weights = torch.tensor(strengths) * mask
        return weights.to(device), torch.tensor(limits, device=device).expand_as(weights)

    def _iterations(self, concepts: Sequence[set[str]], device: torch.device) -> Tensor:
        """How many steps each image may take, [B]."""
        allowed = {c["id"]: c["steer"]["iterations"] for c in self._plain["concepts"] if c["steer"]}
        return torch.tensor([max(allowed[name] for name in names) for names in concepts]).to(device)

    def _records(
        self, weights: Tensor, limits: Tensor, first: Tensor, last: Tensor, taken: Tensor
    ) -> list[Steering]:
        """What was done with each image, told by the concept that was furthest above its limit."""
        unasked = weights == 0
        worst = (first - limits).masked_fill(unasked, -math.inf).argmax(1, keepdim=True)
        reached = ((last <= limits) | unasked).all(1)
        rows = zip(
            worst[:, 0].tolist(),
            taken.tolist(),
            first.gather(1, worst)[:, 0].tolist(),
            last.gather(1, worst)[:, 0].tolist(),
            reached.tolist(),
            strict=True,
        )
        names = [concept["id"] for concept in self._plain["concepts"]]
        return [Steering(names[k], count, a, b, done) for k, count, a, b, done in rows]


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
