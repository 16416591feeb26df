"""The exact posterior against the formula itself, and its tempering."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the exact denoiser is written in torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from latentguard.errors import LatentsError  # noqa: E402
from latentguard.evaluate.exact import ExactDenoiser, Photos, Tempering  # noqa: E402
from latentguard.evaluate.exact.denoiser import class_prior  # noqa: E402
from latentguard.spaces import Latents  # noqa: E402


def _set(count=12, size=20, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=dtype)


def _brute(photos, noisy, alpha, sigma, prior):
    """Weights by the definition, photo by photo, in Python's own floats."""
    rows = []
    for x, a, s, p in zip(noisy, alpha, sigma, prior, strict=True):
        logs = []
        for photo, weight in zip(photos, p.tolist(), strict=True):
            distance = sum((u - float(a) * v) ** 2 for u, v in zip(x.tolist(), photo.tolist()))  # noqa: B905
            logs.append(
                (math.log(weight) if weight else -math.inf) - distance / (2 * float(s) ** 2)
            )
        top = max(logs)
        total = sum(math.exp(value - top) for value in logs)
        rows.append([math.exp(value - top) / total for value in logs])
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(ratio=st.floats(0.02, 50), seed=st.integers(0, 1000), uniform=st.booleans())
def test_posterior_is_bayes_rule(ratio, seed, uniform):
    photos = _set(seed=seed)
    sigma = torch.tensor([ratio / math.hypot(1, ratio)] * 3, dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    noisy = alpha[:, None] * photos[:3] + sigma[:, None] * noise
    prior = torch.full((3, 12), 1 / 12, dtype=torch.float64)
    if not uniform:
        prior = torch.rand(3, 12, generator=generator, dtype=torch.float64)
        prior[:, 4] = 0
        prior /= prior.sum(1, keepdim=True)
    exact = ExactDenoiser(photos)
    wanted = _brute(photos, noisy, alpha, sigma, prior)
    found = exact.weights(noisy, alpha, sigma, prior)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(exact.predict(noisy, alpha, sigma, prior), wanted @ photos)


def test_float32_posterior_of_photo_sized_latents():
    # 32,768 dimensions, where log-likelihoods are in the thousands and rounding could decide.
    photos = _set(30, 32 * 32 * 32, seed=3)
    ratio = torch.tensor([0.05, 1.0, 14.0, 80.0, 157.0], dtype=torch.float64)
    alpha = (1 + ratio**2).rsqrt()
    noise = torch.randn(5, photos.shape[1], generator=torch.Generator().manual_seed(4)).double()
    noisy = alpha[:, None] * photos[:5] + (ratio * alpha)[:, None] * noise
    prior = torch.full((5, 30), 1 / 30, dtype=torch.float64)
    distance = (noisy[:, None] - alpha[:, None, None] * photos[None]).square().sum(-1)
    wanted = torch.softmax(-distance / (2 * (ratio * alpha)[:, None] ** 2), -1)
    found = ExactDenoiser(photos.float()).weights(noisy, alpha, ratio * alpha, prior)
    # Measured: 1.5e-4 at most, where two photos compete.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("ratio", [0.1, 0.6, 2.0, 8.0, 14.6, 30.0])
def test_perplexity_follows_the_schedule(ratio):
    photos = _set(200, 4000)
    tempering = Tempering(one=0.5, all=20)
    alpha = torch.full((6,), (1 + ratio**2) ** -0.5, dtype=torch.float64)
    noise = torch.randn(6, 4000, generator=torch.Generator().manual_seed(1)).double()
    noisy = alpha[:, None] * photos[:6] + ratio * alpha[:, None] * noise
    weights = ExactDenoiser(photos, tempering).weights(noisy, alpha, ratio * alpha)
    perplexity = torch.exp(-torch.special.xlogy(weights, weights).sum(1))
    share = min(1, max(0, math.log(ratio / 0.5) / math.log(40)))
    torch.testing.assert_close(
        perplexity, torch.full_like(perplexity, 200**share), rtol=2e-3, atol=1e-9
    )


def test_tempering_never_sharpens():
    # Photos so close together that even the exact posterior is broad: it stays as it is.
    photos = 0.01 * _set(50, 10)
    alpha, sigma = torch.tensor([0.8] * 2), torch.tensor([0.6] * 2)
    noisy = torch.randn(2, 10, generator=torch.Generator().manual_seed(2)).double()
    tempered = ExactDenoiser(photos, Tempering()).weights(noisy, alpha, sigma)
    torch.testing.assert_close(tempered, ExactDenoiser(photos).weights(noisy, alpha, sigma))


def test_prediction_is_differentiable():
    photos = _set(6, 5)
    alpha, sigma = torch.tensor([0.7]).double(), torch.tensor([0.714]).double()
    noisy = torch.randn(1, 5, generator=torch.Generator().manual_seed(2)).double()
    noisy.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: ExactDenoiser(photos).predict(x, alpha, sigma), (noisy,)
    )
    ExactDenoiser(photos, Tempering(0.1, 5)).predict(noisy, alpha, sigma).sum().backward()
    assert noisy.grad.abs().sum() > 0


def test_class_weights():
    labels = torch.tensor([0, 0, 1, 2])
    weights = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [-1, 0, 2.0]])
    expected = [[0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0.25] * 4, [0, 0, 0, 1]]
    torch.testing.assert_close(class_prior(weights, labels), torch.tensor(expected).double())


def test_tempering_refuses_an_empty_range():
    with pytest.raises(ValueError, match="0 < one < all, got 2 and 1"):
        Tempering(2, 1)


def test_leak_spreads_over_the_whole_set():
    photos = Photos(_latents(), "aaab")
    found = photos.embeds(["b", None], leak=0.4)[:, 0]
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.7], [0.0, 0.0]]))
    torch.testing.assert_close(
        class_prior(found[:1], photos.label_index), torch.tensor([[0.1] * 3 + [0.7]]).double()
    )


def _latents(count=4, **kwargs):
    tensor = torch.randn(count, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    return Latents(tensor, "flux2", scaled=True, **kwargs)


def test_outcome_names_the_nearest_photo():
    photos = Photos(_latents(ids=["a/1", "a/2", "b/1", "b/2"]))
    assert photos.classes == ("a", "b")
    found = photos.outcome(photos.tensor[[2, 0]] + 1e-3)
    assert found.index.tolist() == [2, 0]
    assert found.labels == ("b", "a")
    assert found.distance.max() < 2e-3
    far = photos.outcome((photos.tensor[:1] + photos.tensor[1:2]) / 2)
    assert 0.4 < float(far.distance) < 0.6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Photos(_latents()), "give labels or ids"),
        (lambda: Photos(_latents(), ["a"]), "4 photos need as many labels, got 1"),
        (lambda: Photos(_latents(1), ["a"]), "at least two photos"),
        (lambda: Photos(Latents(torch.ones(2, 32, 4, 4), "flux2", False), "ab"), "scaled"),
        (lambda: Photos(Latents(torch.ones(3, 32, 4, 4), "flux2", True), "abc"), "are equal"),
        (lambda: Photos(_latents(), "aabb").embeds(["c"]), "no class 'c': use one of a, b"),
        (lambda: Photos(_latents(), "aabb").embeds(["a"], leak=2), "leak must be 0 to 1, got 2"),
        (lambda: Photos(_latents(), "aabb").outcome(torch.ones(1, 32, 8, 8)), "got .1, 32, 8, 8."),
    ],
)
def test_sets_that_cannot_be_used(make, message):
    with pytest.raises(LatentsError, match=message):
        make()
