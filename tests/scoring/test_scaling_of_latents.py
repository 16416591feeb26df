"""A model gets the numbers that it was trained on, in whatever convention latents come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentguard import Latents, LatentSpace, Scorer, load_encoder
from latentguard.encoders.catalog import LatentClipConfig
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.files import load_latents
from latentguard.spaces import SPACES, rgb_preview

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"
SMALL = LatentClipConfig(patch=8, embed_dim=512, text_width=128, width=128, layers=2, text_layers=2)
PLAYGROUND = LatentSpace.get("sdxl-playground25")


def pictures() -> torch.Tensor:
    """SDXL latents (scaled) whose RGB view is that of the bundled pictures: [25, 4, 64, 64]."""
    sdxl = SPACES["sdxl"]
    view = torch.from_numpy(rgb_preview(load_latents(EXAMPLES), upscale=2, mode="bicubic"))
    rgb = view.permute(0, 3, 1, 2).float() / 127.5 - 1
    inverse = torch.linalg.pinv(torch.tensor(sdxl.rgb_factors))
    return torch.einsum("brhw,rc->bchw", rgb - torch.tensor(sdxl.rgb_bias).view(3, 1, 1), inverse)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_nano_sdxl_decides_alike_in_every_scaling(dtype: torch.dtype) -> None:
    scorer = Scorer("family", "nano-sdxl", device="cpu")
    scaled = pictures()
    usual = Latents(scaled, "sdxl", scaled=True)
    expected = scorer.verdicts(usual)
    decisions = [verdict.decision for verdict in expected]
    assert "block" in decisions
    raw = usual.to_raw()
    own = Latents(raw.tensor, PLAYGROUND, scaled=False).to_scaled()
    for form in (raw, own):
        found = scorer.verdicts(form.to(dtype))
        assert [verdict.decision for verdict in found] == decisions
    encoder = load_encoder("nano-sdxl")
    torch.testing.assert_close(
        encoder.encode_latents(own), encoder.encode_latents(usual), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("needs_scaled", [True, False])
def test_latent_clip_reads_the_usual_scaling_or_raw(needs_scaled: bool) -> None:
    encoder = LatentCLIP.random(SMALL)
    encoder.needs_scaled = needs_scaled
    raw = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * 5
    expected = SPACES["sdxl"].to_scaled(raw) if needs_scaled else raw
    for space in (SPACES["sdxl"], PLAYGROUND):
        for form in (Latents(raw, space, False), Latents(space.to_scaled(raw), space, True)):
            found = encoder.prepare(form).float()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
