"""E[x0 | x_t] over a finite set, with the weights tempered along the noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BISECTIONS = 30


@dataclass(frozen=True)
class Tempering:
    """How many photos a prediction is the mean of, by noise level.

    In tens of thousands of dimensions the exact posterior over thousands of photos is one photo
    at almost every noise level, so predictions would be sharp from the first step, as no trained
    model's are. Tempered weights have this perplexity (the effective number of photos, of the N
    that the prompt allows) at noise-to-signal ratio r:

        N^s,  s = log(r / one) / log(all / one), clipped to 0 ... 1

    one: up to this noise level the weights are the exact ones. all: from here on every photo
    counts the same, as far as the exact weights are not broader still.
    """

    one: float = 0.5
    all: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.one < self.all:
            raise ValueError(f"tempering needs 0 < one < all, got {self.one:g} and {self.all:g}")

    def share(self, ratio: Tensor) -> Tensor:
        """s at noise-to-signal ratios, of the same shape."""
        position = torch.log(ratio / self.one) / math.log(self.all / self.one)
        return position.clamp(0, 1)


class ExactDenoiser:
    """The posterior over photos given x_t = alpha x0 + sigma noise, and the mean under it.

    photos: [N, D], float32 or float64, which is also what it is computed in.
    tempering: None is the exact posterior.

    Tempered weights are the exact weights of the set shrunk toward its mean m,
    m + beta (x_i - m), with beta in 0 ... 1 found by bisection; the prediction is the weighted
    mean of the photos themselves. Only scaling the log-likelihoods down would not do: a blurred
    trajectory is near m, so that photos of low contrast would always win.
    """

    def __init__(self, photos: Tensor, tempering: Tempering | None = None) -> None:
        self.photos = photos
        self.tempering = tempering
        self._square = photos.square().sum(1)

    def predict(
        self, noisy: Tensor, alpha: Tensor, sigma: Tensor, prior: Tensor | None = None
    ) -> Tensor:
        """E[x0 | x_t] [B, D] of x_t [B, D]; arguments as for `weights`."""
        weights = self.weights(noisy, alpha, sigma, prior)
        return weights.to(self.photos.dtype) @ self.photos

    def weights(
        self, noisy: Tensor, alpha: Tensor, sigma: Tensor, prior: Tensor | None = None
    ) -> Tensor:
        """Posterior weights [B, N] float64 of x_t [B, D]; differentiable in x_t.

        alpha, sigma: [B], of signal and noise; sigma = 0 is taken for 1e-4.
        prior: [B, N], each photo's weight before seeing x_t, rows sum to 1; None is uniform.
        """
        photos = self.photos
        noisy = noisy.to(photos.dtype)
        alpha, sigma = (value.double().view(-1, 1).to(photos.device) for value in (alpha, sigma))
        sigma = sigma.clamp(min=1e-4)
        count = len(photos)
        if prior is None:
            prior = photos.new_full((1, count), 1 / count).expand(len(noisy), count)
        prior = prior.to(photos)
        # Photos in rows of [x_t; m] @ photos.T: the one large product.
        mean = prior @ photos
        products = (torch.cat([noisy, mean]) @ photos.T).double()
        with_noisy, with_mean = products.chunk(2)
        # Up to constants of the row: <x_t - alpha m, x_i - m> and |x_i - m|^2.
        signal = alpha * (with_noisy - alpha * with_mean) / sigma**2
        size = alpha**2 * (self._square.double() - 2 * with_mean) / (2 * sigma**2)
        log_prior = prior.double().log()
        if self.tempering is None:
            return torch.softmax(log_prior + signal - size, -1)
        with torch.no_grad():
            beta = self._beta(signal, size, log_prior, self.tempering.share(sigma / alpha))
        return torch.softmax(log_prior + beta * signal - beta**2 * size, -1)

    @staticmethod
    def _beta(signal: Tensor, size: Tensor, log_prior: Tensor, share: Tensor) -> Tensor:
        """The shrinkage [B, 1] at which the perplexity is N^share, 1 where it is not above it.

        Perplexity relative to the prior, N exp(-KL(weights | prior)) with N = exp(entropy of the
        prior): for a uniform prior that is the usual one.
        """
        prior = log_prior.exp()
        entropy = -(prior * log_prior.nan_to_num(neginf=0)).sum(-1, keepdim=True)
        allowed = (1 - share) * entropy

        def divergence(beta: Tensor) -> Tensor:
            log_weights = torch.log_softmax(log_prior + beta * signal - beta**2 * size, -1)
            gain = (log_weights - log_prior).nan_to_num(nan=0, neginf=0)
            return (log_weights.exp() * gain).sum(-1, keepdim=True)

        high = torch.ones_like(share)
        exact = divergence(high) <= allowed
        low = torch.zeros_like(share)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = divergence(middle) <= allowed
            low = torch.where(fits, middle, low)
            high = torch.where(fits, high, middle)
        # At share 0 the exact posterior itself is wanted: it need not be on one photo alone.
        return torch.where(exact | (share <= 0), torch.ones_like(share), low)


def class_prior(weights: Tensor, label_index: Tensor) -> Tensor:
    """Each photo's prior weight [B, N] under class weights [B, K].

    Negative weights count as 0; each class's weight is shared by its photos; a row without any
    positive weight is the unconditional prompt: every photo the same.
    """
    weights = weights.double().clamp(min=0)
    counts = torch.bincount(label_index, minlength=weights.shape[-1]).clamp(min=1).to(weights)
    each = (weights / counts)[:, label_index]
    total = each.sum(-1, keepdim=True)
    count = len(label_index)
    return torch.where(total > 0, each / total.clamp(min=1e-300), 1 / count)
