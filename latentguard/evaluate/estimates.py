"""Forward-noised latents, and estimates of the clean ones that need no trained model.

The Wiener estimate is the best that a linear denoiser can do (Wiener 1949; per frequency, as the
statistics of photos are nearly the same everywhere in the image). A trained model's prediction of
x0 is better than it and worse than the exact posterior over a set that holds the image.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from latentguard.errors import LatentsError


class Denoise(Protocol):
    """An estimate of x0 from noisy latents."""

    def __call__(self, noisy: Tensor, noise_level: float) -> Tensor:
        """x0 [B, C, H, W] from x0 + noise_level * noise, of the same shape."""
        ...


def add_noise(clean: Tensor, noise_level: float, generator: torch.Generator) -> Tensor:
    """x0 + noise_level * standard normal noise, [B, C, H, W]; float32 or better.

    `generator` is of the tensor's device.
    """
    values = clean if clean.dtype == torch.float64 else clean.float()
    noise = torch.randn(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    return values + noise_level * noise


def unit_variance(noisy: Tensor, noise_level: float) -> Tensor:
    """What variance-preserving schedules call x_t: x0 + r noise, divided by sqrt(1 + r^2)."""
    return noisy / math.hypot(1.0, noise_level)


class Wiener:
    """The optimal linear denoiser of images with a given mean and spectrum.

    Attributes:
        mean: [C, H, W] mean image.
        power: [H, W // 2 + 1, C] float, the variances of the principal channels per frequency.
        basis: [H, W // 2 + 1, C, C] complex, the principal channels per frequency, in columns.

    Source of the formula: S (S + r^2 I)^-1 (y - m) + m with S the covariance of the channels at a
    frequency, for y = x0 + r noise.
    """

    def __init__(self, mean: Tensor, power: Tensor, basis: Tensor) -> None:
        self.mean, self.power, self.basis = mean, power, basis

    @classmethod
    def fit(cls, latents: Tensor, batch: int = 256) -> Wiener:
        """The mean and spectrum of images [N, C, H, W], N at least 2.

        More images than channels are needed for a spectrum of full rank; with few, what was not
        seen is taken for noise, which is what a Wiener filter does.
        Raises LatentsError for fewer than two images.
        """
        if latents.ndim != 4 or len(latents) < 2:
            raise LatentsError(
                f"a spectrum needs latents [N, C, H, W] with N at least 2, got "
                f"{list(latents.shape)}"
            )
        channels, height, width = latents.shape[1:]
        mean = torch.stack([part.double().sum(0) for part in torch.split(latents, batch)]).sum(0)
        mean = (mean / len(latents)).float()
        covariance = torch.zeros(
            height, width // 2 + 1, channels, channels, dtype=torch.complex64, device=latents.device
        )
        for part in torch.split(latents, batch):
            spectrum = torch.fft.rfft2(part.float() - mean, norm="ortho").permute(2, 3, 1, 0)
            covariance += spectrum @ spectrum.mH
        power, basis = torch.linalg.eigh(covariance / (len(latents) - 1))
        return cls(mean, power.clamp(min=0), basis)

    def __call__(self, noisy: Tensor, noise_level: float) -> Tensor:
        """x0 [B, C, H, W] from x0 + noise_level * noise.

        Raises LatentsError for images of another size than those of the fit.
        """
        if noisy.shape[1:] != self.mean.shape:
            raise LatentsError(
                f"the spectrum is of images {list(self.mean.shape)}, got {list(noisy.shape[1:])}"
            )
        if noise_level <= 0:
            return noisy
        gain = self.power / (self.power + noise_level**2)
        spectrum = torch.fft.rfft2(noisy.float() - self.mean, norm="ortho").permute(2, 3, 1, 0)
        filtered = self.basis @ (gain[..., None] * (self.basis.mH @ spectrum))
        filtered = filtered.permute(3, 2, 0, 1)
        size = (noisy.shape[2], noisy.shape[3])
        estimate: Tensor = torch.fft.irfft2(filtered, s=size, norm="ortho") + self.mean
        return estimate
