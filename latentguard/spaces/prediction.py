"""Prediction: noisy latents and the noise that a model predicts in them, before x0 is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentguard.errors import LatentsError
from latentguard.spaces.latents import Latents

if TYPE_CHECKING:
    from torch import Tensor


class Prediction:
    """A batch of clean estimates x0 = (latents - sigma * noise) / alpha that is not computed yet.

    An encoder whose first operator makes x0 on the way reads the two tensors as they are; for all
    others `x0` makes it.

    Attributes:
        latents: the noisy latents, [B, C, H, W], spatial.
        noise: what the model predicts, of the same shape: noise, or the velocity of flow matching.
        alpha, sigma: the same for all images; alpha is above 0.

    Raises:
        LatentsError: packed latents, another shape of the noise, or an alpha that does not divide.
    """

    __slots__ = ("alpha", "latents", "noise", "sigma")

    def __init__(self, latents: Latents, noise: Tensor, alpha: float, sigma: float) -> None:
        if latents.layout != "spatial":
            raise LatentsError("a prediction needs spatial latents, got packed ones")
        if noise.shape != latents.tensor.shape:
            raise LatentsError(
                f"the predicted noise must have the shape of the latents, "
                f"{list(latents.tensor.shape)}, got {list(noise.shape)}"
            )
        if not alpha > 0:
            raise LatentsError(f"alpha must be above 0, got {alpha}")
        self.latents, self.noise, self.alpha, self.sigma = latents, noise, alpha, sigma

    def x0(self) -> Latents:
        """The clean estimate, computed in float32, in the dtype of the latents."""
        noisy = self.latents.tensor
        x0 = (noisy.float() - self.sigma * self.noise.float()) / self.alpha
        latents = self.latents
        return Latents(x0.to(noisy.dtype), latents.space, latents.scaled, ids=latents.ids)

    def pick(self, rows: Sequence[int]) -> Prediction:
        """The images at these indices, in their order."""
        return Prediction(self.latents.pick(rows), self.noise[list(rows)], self.alpha, self.sigma)

    def __len__(self) -> int:
        return len(self.latents)

    def __repr__(self) -> str:
        return f"Prediction({self.latents!r}, alpha {self.alpha:g}, sigma {self.sigma:g})"


def clean(latents: Latents | Prediction) -> Latents:
    """Latents as they are, or a prediction's x0."""
    return latents.x0() if isinstance(latents, Prediction) else latents


def pick(latents: Latents | Prediction, rows: Sequence[int]) -> Latents | Prediction:
    """Some images of either."""
    return latents.pick(rows)
