"""An exported file gives what PyTorch gives: scores, embeddings, heat maps, verdicts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from export_helpers import differences, expected, sdxl
from exported import photos

from latentguard.encoders import Encoder
from latentguard.errors import LatentsError
from latentguard.export import Exported
from latentguard.runtime import Guard
from latentguard.scorer import Scorer

Models = dict[str, Encoder]
Exports = Callable[[str], Exported]

# Two float32 implementations of one network; the promise is 1e-4. Worst seen: 2e-6.
CLOSE = 1e-5


def test_nano_gives_the_same_verdicts(exports: Exports, models: Models) -> None:
    scorer, latents = Scorer("family", models["nano-flux2"]), photos()
    with Guard(exports("nano").path) as guard:
        found = guard.scores(latents.tensor.numpy())
        verdicts = guard.scan(latents.tensor.numpy())
    wanted = expected(scorer, latents)
    assert max(differences(found, wanted).values()) < CLOSE
    decided = scorer.verdicts(latents)
    assert [v.decision for v in verdicts] == [v.decision for v in decided]
    # What comes closest may be a draw; what matched is told in the same words, scores rounded.
    told = [(v.reason, w.reason) for v, w in zip(verdicts, decided, strict=True) if w.matched]
    assert len(told) > 10
    assert all(ours == theirs for ours, theirs in told)
    assert {"allow", "review", "block"} == {v.decision for v in verdicts}


def test_heat_maps_are_the_same(exports: Exports, models: Models) -> None:
    latents = photos()[:4]
    wanted = Scorer("family", models["nano-flux2"]).heatmaps(latents)
    with Guard(exports("nano").path) as guard:
        found = guard.heatmaps(latents.tensor.numpy())
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < CLOSE


@pytest.mark.parametrize("count", [1, 3, 25])
def test_any_number_of_images(count: int, exports: Exports) -> None:
    array = photos().tensor.numpy()
    with Guard(exports("nano").path) as guard:
        whole = guard.scores(array)["margin"]
        part = guard.scores(array[:count])["margin"]
    assert part.shape == (count, whole.shape[1])
    assert np.abs(part - whole[:count]).max() < CLOSE


@pytest.mark.slow
@pytest.mark.slow
def test_nano_sdxl_agrees(exports: Exports, models: Models) -> None:
    latents = sdxl(4, (64, 64))
    with Guard(exports("nano-sdxl").path) as guard:
        found = guard.scores(latents.tensor.numpy())
    wanted = expected(Scorer("family", models["nano-sdxl"]), latents)
    assert max(differences(found, wanted).values()) < CLOSE


@pytest.mark.slow
def test_raw_and_scaled_inputs_mean_the_same_image(exports: Exports, models: Models) -> None:
    scaled = sdxl(4, (64, 64))
    raw = scaled.to_raw()
    wanted = expected(Scorer("family", models["b8"]), raw)
    with Guard(exports("clip").path) as takes_scaled, Guard(exports("clip-raw").path) as takes_raw:
        assert (takes_scaled.scaled, takes_raw.scaled) == (True, False)
        right = takes_scaled.scores(scaled.tensor.numpy()), takes_raw.scores(raw.tensor.numpy())
        wrong = takes_raw.scores(scaled.tensor.numpy())
    for found in right:
        assert max(differences(found, wanted).values()) < CLOSE
    assert differences(wrong, wanted)["embedding"] > 100 * CLOSE


# Neither square nor multiples of the patch; trained size, larger, thin.
LARGER = [(64, 64), (96, 64), (8, 120)]


@pytest.mark.parametrize(
    "size", [(61, 50), *(pytest.param(size, marks=pytest.mark.slow) for size in LARGER)]
)
def test_open_height_and_width(size: tuple[int, int], exports: Exports, models: Models) -> None:
    scorer, latents = Scorer("family", models["b4"]), sdxl(2, size)
    with Guard(exports("clip-open").path) as guard:
        found = guard.scores(latents.tensor.numpy())
        maps = guard.heatmaps(latents.tensor.numpy())
    assert max(differences(found, expected(scorer, latents)).values()) < CLOSE
    wanted = scorer.heatmaps(latents)
    assert maps.shape == wanted.shape
    assert np.abs(maps - wanted).max() < CLOSE


def test_a_fixed_size_is_kept_to(exports: Exports) -> None:
    with (
        Guard(exports("nano").path) as guard,
        pytest.raises(LatentsError, match="was exported for 32x32 latent cells, got 48x32"),
    ):
        guard.scan(np.zeros((1, 32, 48, 32), np.float32))


# Measured on the bundled latents: 7e-4 and 2e-4, 0.039 and 0.989, 0.003 and 0.99998.
@pytest.mark.parametrize(
    ("name", "margin", "cosine"),
    [
        ("nano-fp16", 0.01, 0.999),
        pytest.param("nano-int8", 0.1, 0.98, marks=pytest.mark.slow),
        pytest.param("nano-dynamic", 0.01, 0.9999, marks=pytest.mark.slow),
    ],
)
def test_nano_in_other_precisions(
    name: str, margin: float, cosine: float, exports: Exports, models: Models
) -> None:
    scorer, latents = Scorer("family", models["nano-flux2"]), photos()
    wanted = expected(scorer, latents)
    with Guard(exports(name).path) as guard:
        found = guard.scores(latents.tensor.numpy())
        verdicts = guard.scan(latents.tensor.numpy())
    assert differences(found, wanted)["margin"] < margin
    assert (found["embedding"] * wanted["embedding"]).sum(1).min() > cosine
    assert [v.decision for v in verdicts] == [v.decision for v in scorer.verdicts(latents)]


@pytest.mark.parametrize(
    ("name", "least"),
    [
        pytest.param("clip-fp16", 0.9999, marks=pytest.mark.slow),
        ("clip-int8", 0.999),
        ("clip-dynamic", 0.999),
    ],
)
def test_latent_clip_in_other_precisions(
    name: str, least: float, exports: Exports, models: Models
) -> None:
    latents = sdxl(8, (64, 64))
    wanted = expected(Scorer("family", models["b8"]), latents)["embedding"]
    with Guard(exports(name).path) as guard:
        found = guard.embed(latents.tensor.numpy())
    assert (found * wanted).sum(1).min() > least
    # Norms are taken in float32 in every precision.
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < CLOSE


@pytest.mark.slow
def test_what_the_export_reports_is_what_it_is(exports: Exports, models: Models) -> None:
    made = exports("nano-int8")
    wanted = expected(Scorer("family", models["nano-flux2"]), photos())
    with Guard(made.path) as guard:
        found = guard.scores(photos().tensor.numpy())
    checked = made.checked
    assert (checked.images, checked.real, checked.same_decisions) == (25, True, 25)
    assert checked.margin == pytest.approx(differences(found, wanted)["margin"], rel=1e-3)
    assert checked.embedding == pytest.approx(differences(found, wanted)["embedding"], rel=1e-3)
    assert not exports("clip").checked.real
