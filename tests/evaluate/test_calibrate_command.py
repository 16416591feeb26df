"""`latentguard calibrate` end to end on real latents, and the estimates that it scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="scoring needs torch")

from typer.testing import CliRunner  # noqa: E402

from latentguard import Scorer  # noqa: E402
from latentguard.cli import app, register  # noqa: E402
from latentguard.encoders.catalog import bundled_path  # noqa: E402
from latentguard.errors import LatentGuardError, LatentsError, ModelError, PolicyError, UsageError  # noqa: E402
from latentguard.evaluate.calibrate import measure  # noqa: E402
from latentguard.evaluate.estimates import Wiener, add_noise, unit_variance  # noqa: E402
from latentguard.files import load_latents, save_latents  # noqa: E402
from latentguard.policy import load_lock, load_policy, lock_path  # noqa: E402
from latentguard.spaces import Latents  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"

POLICY = """
schema_version: 1
name: shop
version: "1"
contrast: [animal, flower, food, furniture, musical instrument]
concepts:
  - id: handguns
    category: firearms
    prompts: [revolver]
    threshold: {fpr: 0.1}
    action: block
  - id: knives
    category: blades
    prompts: [letter opener]
    threshold: {fpr: 0.1}
    action: review
"""

needs_nano = pytest.mark.skipif(
    not bundled_path("nano-flux2").is_file(), reason="needs the bundled nano-flux2"
)


@pytest.fixture
def policy_path(tmp_path):
    path = tmp_path / "shop.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture(scope="module", autouse=True)
def _commands():
    if not any(command.name == "calibrate" for command in app.registered_commands):
        register()


def _run(*arguments):
    result = CliRunner().invoke(app, ["calibrate", *map(str, arguments)], catch_exceptions=True)
    if isinstance(result.exception, LatentGuardError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@needs_nano
def test_from_files_to_a_deciding_policy(tmp_path, policy_path):
    plot = tmp_path / "thresholds.png"
    out = _run(
        EXAMPLES, "--policy", policy_path, "--model", "nano-flux2", "--fpr", 0.1, "--fpr", 0.25,
        "--noise-levels", "0,0.5,4", "--plot", plot,
    )  # fmt: skip
    assert "fpr 0.1" in out
    assert "wrote" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    policy = load_policy(policy_path)
    assert len(policy.lock.entries) == 6
    assert policy.lock.entries[0].calibrated_on == "25 images, noised, x_t"
    scorer = Scorer(policy, "nano-flux2")
    latents = load_latents(EXAMPLES)
    verdicts = scorer.verdicts(latents)
    assert all(verdict.error is None for verdict in verdicts)
    # At a tenth of 25 images, rank 24: at most one image of the calibration set is above.
    matched = np.array([[c.matched for c in verdict.concepts] for verdict in verdicts])
    assert matched.sum(0).max() == 1
    assert latents.ids[int(matched[:, 0].argmax())].startswith("revolver")
    # Between two levels the policy decides, too; above them it cannot.
    assert scorer.verdicts(latents[0], noise_level=2.0, final=False)[0].error is None
    assert "calibrated for noise levels 0 to 4" in scorer.verdicts(latents[0], 5.0)[0].error


@needs_nano
def test_rates_default_to_the_policy_and_dry_run_writes_nothing(policy_path):
    out = _run(EXAMPLES, "--policy", policy_path, "--model", "nano-flux2", "--dry-run")
    assert "fpr 0.1" in out
    assert not lock_path(policy_path).exists()


@needs_nano
def test_it_says_which_thresholds_do_not_read_the_lock(policy_path):
    text = policy_path.read_text()
    given = (EXAMPLES, "--policy", policy_path, "--model", "nano-flux2", "--fpr", 0.1)
    assert "note:" not in _run(*given)
    policy_path.write_text(text.replace("{fpr: 0.1}", "{probability: 0.5}", 1))
    out = _run(*given)
    assert "the thresholds of handguns are not false-positive rates" in out
    assert "write `threshold: {fpr: 0.1}`" in out


@needs_nano
def test_wiener_uses_disjoint_halves(policy_path):
    found = measure([EXAMPLES], policy_path, "nano-flux2", noise_levels=[0, 1], estimate="wiener")
    assert {len(v) for by in found.values.values() for v in by.values()} == {12}
    assert found.source == "12 images, noised, their Wiener estimate"
    again = measure(
        [EXAMPLES], policy_path, "nano-flux2", noise_levels=[0, 1], estimate="wiener", batch_size=5
    )
    # Other batches, the same noise for each image: generators draw in the order of the images.
    for level in (0.0, 1.0):
        np.testing.assert_allclose(
            found.values["handguns"][level], again.values["handguns"][level], atol=1e-4
        )


@needs_nano
def test_from_trajectories(tmp_path, policy_path):
    scorer = Scorer(load_policy(policy_path, use_lock=False), "nano-flux2")
    identity = {"model": "nano-flux2", "model_sha256": scorer.encoder.sha256, "space": "flux2"}
    latents = load_latents(EXAMPLES)
    margin = scorer.score(latents).margin
    log = tmp_path / "audit.jsonl"
    with log.open("w") as file:
        for image, values in enumerate(margin.tolist()):
            concepts = [
                {"id": c.id, "margin": v}
                for c, v in zip(scorer.policy.concepts, values, strict=True)
            ]
            line = {**identity, "request_id": image, "noise_level": 0.5, "concepts": concepts}
            file.write(json.dumps(line) + "\n")
    _run("--trajectories", log, "--policy", policy_path)
    lock = load_lock(lock_path(policy_path))
    assert [entry.noise_level for entry in lock.entries] == [0.5, 0.5]
    with pytest.raises(LatentsError, match="the records are of space 'flux2', not 'sdxl'"):
        _run("--trajectories", log, "--policy", policy_path, "--space", "sdxl")
    for option in (("--noise-levels", "1"), ("--estimate", "wiener"), ("--seed", 1), ("--scaled",)):
        with pytest.raises(UsageError, match="--seed are about latents: records say at which"):
            _run("--trajectories", log, "--policy", policy_path, *option)
    expected = sorted(margin[:, 0].tolist())[23]
    found = next(e for e in lock.entries if e.concept == "handguns").margins[0].margin
    assert expected < found < expected + 1e-6


@needs_nano
def test_refusals(tmp_path, policy_path):
    with pytest.raises(ModelError, match="at least 999 images, got 25"):
        _run(EXAMPLES, "--policy", policy_path, "--model", "nano-flux2", "--fpr", 0.001)
    with pytest.raises(PolicyError, match="ships with latentguard"):
        _run(EXAMPLES, "--policy", "weapons", "--fpr", 0.1)
    with pytest.raises(ModelError, match="either latents files or"):
        _run("--policy", policy_path)
    with pytest.raises(ModelError, match="no threshold of the policy is a false-positive rate"):
        _run(EXAMPLES, "--policy", "weapons", "--dry-run")
    with pytest.raises(ModelError, match="--noise-levels must be numbers"):
        _run(EXAMPLES, "--policy", policy_path, "--noise-levels", "a,b")
    assert not lock_path(policy_path).exists()


# -- estimates -------------------------------------------------------------------------------------


def _fields(count, seed=0, size=16):
    """Gaussian images with a known spectrum and correlated channels, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, 4, size, size, generator=generator)
    y, x = (torch.fft.fftfreq(size) * size for _ in range(2))
    gain = 1 / (1 + (y[:, None] ** 2 + x[None] ** 2)) ** 0.5
    smooth = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
    mix = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.4, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0.3]])
    return torch.einsum("kc,bchw->bkhw", mix, smooth) + torch.arange(4.0).view(4, 1, 1)


def _expected_error(wiener: Wiener, noise_level: float) -> float:
    """Mean squared error per number that its own statistics predict at a noise level."""
    noise = noise_level**2
    error = (wiener.power * noise / (wiener.power + noise)).sum(-1)
    # rfft2 keeps half of the columns: the others are their mirror images.
    height, half = error.shape
    channels, _, width = wiener.mean.shape[-3:]
    assert width % 2 == 0
    counts = torch.full((half,), 2.0)
    counts[0] = counts[-1] = 1
    return float((error * counts).sum() / (height * width * channels))


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
def test_wiener_reaches_the_error_of_the_optimal_linear_denoiser(ratio):
    """On Gaussian images it is the posterior mean, whose error is known from the covariance."""
    wiener = Wiener.fit(_fields(4000))
    fresh = _fields(500, seed=1)
    noisy = add_noise(fresh, ratio, torch.Generator().manual_seed(2))
    error = float((wiener(noisy, ratio) - fresh).square().mean())
    # By brute force, in float64, from the true covariance of all numbers of an image.
    samples = _fields(6000, seed=3).double().flatten(1)
    centered = samples - samples.mean(0)
    values = torch.linalg.eigvalsh(centered.T @ centered / len(samples)).clamp(min=0)
    optimal = float((values * ratio**2 / (values + ratio**2)).mean())
    assert error == pytest.approx(_expected_error(wiener, ratio), rel=0.03)
    # 6,000 samples of 1,024 numbers bias the brute-force optimum down by up to a tenth.
    assert 0.97 * optimal < error < 1.12 * optimal
    plain = float((unit_variance(noisy, ratio) - fresh).square().mean())
    assert error < plain


def test_wiener_edges():
    images = _fields(50, size=8)
    wiener = Wiener.fit(images)
    torch.testing.assert_close(wiener(images, 0.0), images)
    torch.testing.assert_close(wiener(images, 1e-4), images, atol=1e-2, rtol=0)
    everything = wiener(images, 1e4)
    torch.testing.assert_close(everything, images.mean(0).expand_as(images), atol=1e-3, rtol=0)
    odd = Wiener.fit(_fields(30, size=7))
    assert odd(_fields(2, size=7), 1.0).shape == (2, 4, 7, 7)
    with pytest.raises(LatentsError, match=r"is of images \[4, 8, 8\], got \[4, 7, 7\]"):
        wiener(_fields(1, size=7), 1.0)
    with pytest.raises(LatentsError, match="N at least 2"):
        Wiener.fit(images[:1])


def test_wiener_needs_one_size(tmp_path, policy_path):
    for name, size in (("a", 8), ("b", 16)):
        tensor = torch.randn(3, 32, size, size)
        save_latents(tmp_path / f"{name}.pt", Latents(tensor, "flux2", True))
    with pytest.raises(LatentsError, match="images of one size, got 32x8x8, 32x16x16"):
        measure([tmp_path / "a.pt", tmp_path / "b.pt"], policy_path, "nano-flux2",
                noise_levels=[1], estimate="wiener")  # fmt: skip
