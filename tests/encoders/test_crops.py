"""An image is read whole and in crops, and its best view decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentguard import LatentGuardError, Latents, Scorer, load_policy, scan_files
from latentguard.encoders import load_encoder, strongest_view
from latentguard.encoders.crops import PER_AXIS, Crops, boxes_of
from latentguard.files import load_latents
from latentguard.scan import Scan

EXAMPLES = Path(__file__).parents[2] / "examples" / "latents.pt"
SIDE = 32


@given(st.integers(1, 400), st.integers(1, 400))
def test_crops_cover_the_image(height: int, width: int) -> None:
    boxes = boxes_of(height, width, SIDE)
    assert len(boxes) <= PER_AXIS**2
    seen = np.zeros((height, width), bool)
    sizes = {(b - a, d - c) for a, b, c, d in boxes}
    for top, bottom, left, right in boxes:
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        seen[top:bottom, left:right] = True
    assert len(sizes) == (1 if boxes else 0)
    assert seen.all() if boxes else height <= SIDE and width <= SIDE


def test_overlap_is_half_where_few_are_enough() -> None:
    spans = [box[:2] for box in boxes_of(64, 32, SIDE)]
    assert spans == [(0, 32), (16, 48), (32, 64)]
    assert len(boxes_of(128, 128, SIDE)) == 25


def example(name: str) -> torch.Tensor:
    latents = load_latents(EXAMPLES)
    index = next(i for i, one in enumerate(latents.ids or ()) if name in one)
    return latents[index].tensor.float()


def scene() -> Latents:
    """A revolver in a picture of 1024 px that shows something else, where one of its crops is."""
    calm = load_latents(EXAMPLES)[0].tensor.float()
    large = torch.nn.functional.interpolate(calm, size=(128, 128), mode="bilinear")
    large[..., 72:104, 0:32] = example("revolver")
    return Latents(large, "flux2", scaled=True)


def test_a_small_object_is_found() -> None:
    policy = load_policy("weapons")
    whole = Scorer(policy, "nano-flux2").verdicts(scene())[0]
    crops = Scorer(policy.with_views("crops"), "nano-flux2").verdicts(scene())[0]
    assert whole.decision == "allow"
    assert crops.decision == "block"
    assert "'handguns'" in crops.reason
    assert whole.model is not None
    assert crops.model is not None
    assert (whole.model.name, crops.model.name) == ("nano-flux2", "nano-flux2+views=crops")


def test_the_best_view_decides_less_its_lead() -> None:
    encoder = load_encoder("nano-flux2")
    latents = scene()
    scorer = Scorer("weapons", encoder)
    boxes = boxes_of(128, 128, SIDE)
    views = [latents.tensor, *(latents.tensor[..., a:b, c:d] for a, b, c, d in boxes)]
    margins = [scorer.score(Latents(view, "flux2", scaled=True)).margin[0] for view in views]
    lead = Crops(encoder).lead(len(margins) - 1)
    want = torch.stack([margins[0], *(margin - lead for margin in margins[1:])]).amax(0)
    found = Scorer("weapons", Crops(encoder)).score(latents)
    torch.testing.assert_close(found.margin[0], want, atol=1e-4, rtol=0)
    probability = (encoder.logit_scale * found.margin).sigmoid()
    torch.testing.assert_close(found.probability, probability)


def test_images_of_one_crop_score_as_before() -> None:
    latents = load_latents(EXAMPLES)[:4]
    policy = load_policy("weapons")
    before = Scorer(policy, "nano-flux2").score(latents)
    after = Scorer(policy, "nano-flux2+views=crops").score(latents)
    assert torch.equal(before.margin, after.margin)


def test_steps_on_the_way_are_read_whole() -> None:
    scorer = Scorer(load_policy("weapons").with_views("crops"), "nano-flux2")
    on_the_way = scorer.judge(scene(), 1.0, final=False).verdicts[0]
    assert on_the_way.decision == "allow"
    assert scorer.judge(scene()).verdicts[0].decision == "block"


def test_nan_in_one_crop_fails() -> None:
    margin = torch.tensor([[0.1], [0.3], [torch.nan]])
    _, best, _ = strongest_view(3, margin, margin, torch.zeros(3, 1).long(), 0.1, 10.0)
    assert best.isnan().all()


def test_scan_with_crops(tmp_path: Path) -> None:
    path = tmp_path / "scene.npy"
    np.save(path, scene().tensor.numpy())
    options = {"space": "flux2", "scaled": True}
    decisions = [
        [r.verdict.decision for r in scan_files(path, "weapons", views=views, **options)]
        for views in (None, "whole", "crops")
    ]
    assert decisions == [["allow"], ["allow"], ["block"]]


@pytest.mark.parametrize(("views", "told"), [(None, True), ("whole", False), ("crops", False)])
def test_a_scan_says_that_large_images_were_read_whole(
    views: str | None, told: bool, tmp_path: Path
) -> None:
    path = tmp_path / "scene.npy"
    np.save(path, scene().tensor.numpy())
    scan = Scan(path, "weapons", "nano-flux2", space="flux2", scaled=True, views=views)
    assert len(list(scan)) == 1
    assert any("were read whole" in note for note in scan.notes) == told


def test_a_scan_says_nothing_of_small_images(tmp_path: Path) -> None:
    scan = Scan(EXAMPLES, "weapons", "nano-flux2")
    assert len(list(scan)) == 25
    assert not any("read whole" in note for note in scan.notes)


def test_more_crops_need_a_larger_lead() -> None:
    crops = Crops(load_encoder("nano-flux2"))
    assert crops.lead(4) == crops.lead(9) == 0.25
    assert crops.lead(25) == pytest.approx(0.352, abs=1e-3)


def test_models_without_a_measured_lead_are_refused() -> None:
    with pytest.raises(LatentGuardError, match="nano-sdxl is not read in crops"):
        load_encoder("nano-sdxl+views=crops")
    with pytest.raises(LatentGuardError, match="views are `whole` or `crops`"):
        load_encoder("nano-flux2+views=tiles")


@pytest.mark.slow
def test_gradients_reach_the_latents() -> None:
    tensor = scene().tensor.requires_grad_()
    scorer = Scorer("weapons", "nano-flux2+views=crops")
    scorer.score(Latents(tensor, "flux2", scaled=True)).margin.sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.abs().amax() > 0
