"""The forms in which pipelines hold latents, by themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentguard import LatentSpace
from latentguard.errors import LatentsError
from latentguard.guard.forms import (
    CHANNELS_LAST,
    FRAMED,
    SPATIAL,
    Form,
    patches,
    tokens,
    tokens_by_cell,
)
from latentguard.guard.layout import Layout

FORMS = (
    *(SPATIAL, FRAMED, CHANNELS_LAST, tokens(1), tokens(2), tokens(3)),
    *(tokens_by_cell(2), patches(2)),
)


@given(
    st.sampled_from(FORMS),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_a_form_gives_back_what_it_was_made_of(
    form: Form, batch: int, channels: int, rows: int, columns: int
) -> None:
    size = (rows * form.patch, columns * form.patch)
    latents = torch.randn(batch, channels, *size)
    held = form.restored(latents)
    assert held.numel() == latents.numel()
    assert form.fits(held.shape, channels)
    assert form.fits(held.shape, channels, size)
    assert torch.equal(form.spatial(held, channels, size), latents)
    assert not form.fits(held.shape, channels + 1)


def test_orders_of_tokens() -> None:
    """As FLUX.1 and Ideogram 4 write them."""
    latents = torch.randn(2, 3, 4, 6)
    split = latents.view(2, 3, 2, 2, 3, 2)
    flux = split.permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 12)
    ideogram = split.permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 12)
    assert torch.equal(tokens(2).restored(latents), flux)
    assert torch.equal(tokens_by_cell(2).restored(latents), ideogram)


def test_the_first_form_that_fits_counts() -> None:
    space = LatentSpace.get("sdxl")
    layout = Layout(space, (tokens(2), tokens(1), SPATIAL))
    latents = torch.randn(1, 4, 8, 6)
    for form in layout.forms:
        read = layout.read(form.restored(latents), (64, 48))
        assert torch.equal(read.to_spatial().tensor, latents)
        assert torch.equal(layout.written(read, form.restored(latents)), form.restored(latents))


@pytest.mark.parametrize(
    ("shape", "pixels", "message"),
    [
        ((1, 12, 16), None, "the pipeline gave no size for them, or another one"),
        ((1, 12, 16), (64, 64), "the pipeline gave no size for them, or another one"),
        ((1, 12, 20), (64, 48), r"must have 4 channels in the form \[b \(hw\) \(cpq\)\] with"),
        ((1, 3, 8, 6), None, "must have 4 channels"),
        ((2, 4, 1, 8, 6), None, "must have 4 channels"),
    ],
)
def test_other_shapes_are_refused(
    shape: tuple[int, ...], pixels: tuple[int, int] | None, message: str
) -> None:
    layout = Layout(LatentSpace.get("sdxl"), (tokens(2), SPATIAL))
    with pytest.raises(LatentsError, match=message):
        layout.read(torch.zeros(shape), pixels)
