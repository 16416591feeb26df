"""torch.compile takes encoder and scorer as one graph: a break would hand pieces back to Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip_reference import SMALL_B8, Reference
from torch import Tensor

from latentguard.encoders import Encoder, load_encoder
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.policy import Policy
from latentguard.scorer import Scorer
from latentguard.spaces import Latents, LatentSpace

POLICY = Policy.model_validate(
    {
        "schema_version": 1,
        "name": "compiled",
        "version": "1",
        "uncovered": "warn",
        "concepts": [
            {
                "id": "firearms",
                "category": "weapons",
                "prompts": ["revolver", "rifle"],
                "contrast": ["power drill"],
                "threshold": {"probability": 0.5},
                "action": "block",
            }
        ],
    }
)


@pytest.fixture(
    params=["latent-clip", "nano-flux2", pytest.param("nano-sdxl", marks=pytest.mark.slow)]
)
def encoder(
    request: pytest.FixtureRequest, reference_b8: Reference, official: Callable[..., Path]
) -> Encoder:
    """A Latent-CLIP of random weights, and the two bundled models."""
    if request.param == "latent-clip":
        return LatentCLIP.load(official(reference_b8.checkpoint()), config=SMALL_B8)
    return load_encoder(request.param)


# Of the norm: a compiled graph adds up in another order, and a ReLU may take the other side. Worst
# seen 1.6e-3, by one; a graph that is wrong differs by the norm itself.
CLOSE = 5e-3


def _close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for found, right in zip(got, want, strict=True):
        assert (found - right).norm() <= CLOSE * right.norm()


def _latents(encoder: Encoder) -> Tensor:
    channels = LatentSpace.get(encoder.space).channels
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))


def _gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def test_the_encoder_is_one_graph(encoder: Encoder) -> None:
    def loss(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        features = encoder.features(x, noise, 1 + sigma, sigma)
        weights = torch.linspace(-1, 1, features.pooled.shape[-1])
        return (features.pooled * weights).sum() + (features.tokens * weights).sum()

    x = _latents(encoder)
    rest = (torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), torch.rand(2))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = (_gradient(lambda t, f=f: f(t, *rest), x) for f in (loss, compiled))
    _close(got, want)


def test_the_scorer_is_one_graph(reference_b8: Reference, official: Callable[..., Path]) -> None:
    encoder = LatentCLIP.load(official(reference_b8.checkpoint()), config=SMALL_B8)
    scorer = Scorer(POLICY, encoder)

    def margins(x: Tensor) -> Tensor:
        return scorer.score(Latents(x, encoder.space, scaled=True)).margin.sum()

    x = _latents(encoder)
    compiled = torch.compile(margins, fullgraph=True, backend="aot_eager")
    want, got = (_gradient(f, x) for f in (margins, compiled))
    _close(got, want)
