"""Recognition: certain on real latents, a question on everything that is not certain.

Real FLUX.2 latents (TAEF2's) lie beside this file. There are no SDXL or SD 1 latents here, so the
rule for four channels is tried on those photographs carried over to the other spaces' published
statistics channel by channel: its arithmetic and margins are tested, not the statistics.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentguard.errors import LatentsError
from latentguard.files import load_latents
from latentguard.spaces import SPACES, LatentSpace, recognize

PHOTOS = load_latents(Path(__file__).parent / "taef2_photos.safetensors").tensor.double()


def carried_over(name: str, scaled: bool) -> Tensor:
    """[4, 4, 32, 32]: the photographs with the statistics of another space."""
    space = SPACES[name]
    assert isinstance(space.scale, float)
    channels = PHOTOS[:, [3, 8, 15, 19]]
    # Deviations over photographs in general; those of four photographs say little.
    standard = channels / torch.tensor([1.02, 1.02, 1.03, 1.01]).view(4, 1, 1)
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(4, 1, 1) for x in (space.mean, space.std)
    )
    raw = standard * std + mean
    return raw * space.scale if scaled else raw


@pytest.mark.parametrize("index", range(4))
def test_one_real_flux2_image_is_enough(index: int) -> None:
    found = recognize(PHOTOS[index])
    assert (found.space, found.scaled, found.question, found.certain) == ("flux2", True, "", True)
    # Raw latents are 1.7 to 1.86 times larger, channel by channel.
    for factor in (1.7, 1.86):
        assert recognize(PHOTOS[index] * factor).scaled is False


def test_shuffled_flux2_channels_are_another_space() -> None:
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    found = recognize(PHOTOS[:, order])
    assert found.space is None
    assert "are not certainly FLUX.2's" in found.question
    assert "--space flux2 or --space hunyuan-video-1.5 or --space sana and" in found.question


def test_flux2_between_the_scalings_is_asked() -> None:
    # The level of these four photographs is 2.5 scaled; 2.9 is neither.
    level = recognize(PHOTOS * 1.16)
    assert (level.space, level.scaled) == ("flux2", None)
    assert level.question.endswith("say --scaled or --unscaled")
    assert recognize(PHOTOS * 1.16, scaled=True).certain
    assert recognize(PHOTOS / 4).scaled is None


@pytest.mark.parametrize("name", ["sdxl", "sd1"])
@pytest.mark.parametrize("scaled", [True, False])
def test_four_channels(name: str, scaled: bool) -> None:
    found = recognize(carried_over(name, scaled))
    assert (found.space, found.scaled) == (name, scaled)


@pytest.mark.parametrize("name", ["sdxl", "sd1"])
@pytest.mark.parametrize("scaled", [True, False])
def test_one_image_is_never_wrong(name: str, scaled: bool) -> None:
    for image in carried_over(name, scaled):
        found = recognize(image)
        assert (found.space, found.scaled) in ((name, scaled), (None, None))
        assert found.certain is (found.question == "")
        assert recognize(image, space=name).scaled in (scaled, None)


def test_playground_is_asked_for() -> None:
    sdxl = SPACES["sdxl"]
    mean, std = (torch.tensor(x, dtype=torch.float64).view(4, 1, 1) for x in (sdxl.mean, sdxl.std))
    found = recognize((carried_over("sdxl", False) - mean) * 0.5 / std)
    assert not found.certain
    assert "fit sdxl-playground25 scaled best, a scaling that has to be given" in found.question


@pytest.mark.parametrize("scaled", [True, False])
def test_a_space_with_a_scaling_of_its_own_is_recognized_by_that_scaling(scaled: bool) -> None:
    playground = LatentSpace.get("sdxl-playground25")
    raw = carried_over("sdxl", False)
    own = playground.to_scaled(raw) if scaled else raw
    found = recognize(own, space=playground)
    assert (found.space, found.scaled) == ("sdxl", scaled)
    usual = recognize(carried_over("sdxl", True), space=playground)
    assert usual.scaled is None
    assert "fit sdxl scaled best, a scaling that has to be given" in usual.question


def test_what_is_known_is_not_asked() -> None:
    image = carried_over("sdxl", True)
    assert recognize(image * 3, space="sdxl").space == "sdxl"
    assert recognize(image * 3, scaled=True).scaled is True
    noise = torch.randn(1, 4, 32, 32)
    assert recognize(noise, space="sdxl", scaled=True).certain
    assert recognize(noise, space="sdxl").question.endswith("say --scaled or --unscaled")
    assert recognize(noise, scaled=True).question.endswith("say --space sdxl or --space sd1")


def test_sixteen_channels_are_always_asked() -> None:
    found = recognize(PHOTOS[:, :16])
    assert (found.space, found.scaled) == (None, None)
    assert found.question == (
        "sd3, flux1, wan21, hunyuan-video and cosmos1 have the same shape, and no published "
        "statistics tell which: say --space sd3 or --space flux1 or --space wan21 or "
        "--space hunyuan-video or --space cosmos1 and --scaled or --unscaled"
    )
    assert recognize(PHOTOS[:, :16], space="flux1").question == (
        "no published statistics tell scaled from raw flux1 latents: say --scaled or --unscaled"
    )
    assert recognize(PHOTOS[:, :16], scaled=True).question.endswith(
        "or --space hunyuan-video or --space cosmos1"
    )


@pytest.mark.parametrize("channels", [4, 32])
@pytest.mark.parametrize("factor", [0.13, 0.5, 1.0, 5.0, 14.6])
def test_noise_is_never_recognized(channels: int, factor: float) -> None:
    noise = torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(2)) * factor
    found = recognize(noise)
    assert (found.space, found.scaled) == (None, None)
    assert "look like noise" in found.question


def test_noise_with_the_statistics_of_sdxl_is_still_noise() -> None:
    sdxl = SPACES["sdxl"]
    mean, std = (torch.tensor(x).view(4, 1, 1) for x in (sdxl.mean, sdxl.std))
    assert "look like noise" in recognize(torch.randn(4, 4, 64, 64) * std + mean).question


@pytest.mark.parametrize(
    ("tensor", "question"),
    [
        (torch.zeros(1, 4, 32, 32), "a channel is constant"),
        (torch.full((2, 32, 32, 32), 3.0), "a channel is constant"),
        (torch.full((1, 4, 32, 32), float("nan")), "NaN or Inf"),
        (torch.randn(1, 4, 4, 4), "fewer than 64 cells"),
        (torch.randn(1, 3, 32, 32), "no known space has 3 channels .*sdxl 4"),
        (torch.randn(1, 5, 32, 32), "no known space has 5 channels"),
    ],
)
def test_what_is_no_picture(tensor: Tensor, question: str) -> None:
    found = recognize(tensor)
    assert not found.certain
    assert re.search(question, found.question)


def test_smooth_but_foreign_statistics_are_asked() -> None:
    ramp = torch.linspace(-1, 1, 32).expand(1, 4, 32, 32) * torch.tensor([90, 80, 70, 60.0]).view(
        4, 1, 1
    )
    assert recognize(ramp + 100).question.startswith("the statistics fit no known reading")


def test_images_of_several_sizes_and_dtypes() -> None:
    images = [*PHOTOS.half(), PHOTOS[0, :, :16, :24].to(torch.bfloat16)]
    assert recognize(images).space == "flux2"
    assert "different channels [4, 32]" in recognize([PHOTOS[0], PHOTOS[0, :4]]).question
    wrong = recognize(PHOTOS, space="sdxl")
    assert wrong.question == "space sdxl has 4 channels, the latents have 32"


def test_what_is_no_latents_raises() -> None:
    with pytest.raises(LatentsError, match=r"\[B, C, H, W\] or \[C, H, W\], got \[32, 32\]"):
        recognize(torch.zeros(32, 32))
    with pytest.raises(LatentsError, match="no latents to recognize"):
        recognize([])
    with pytest.raises(LatentsError, match="use one of"):
        recognize(PHOTOS, space="sd2")
