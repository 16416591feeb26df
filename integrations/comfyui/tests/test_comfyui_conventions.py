"""From ComfyUI's tensors to Latents and back, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_pictures import bundled, raw
from hypothesis import given, settings
from hypothesis import strategies as st
from latentguard_comfyui.conventions import (
    BY_SPACE,
    FORMATS,
    SPACE_CHOICES,
    held_by,
    latents_of,
    read,
    tensor_like,
    tensor_of,
)

from latentguard import LatentsError, LatentSpace


def format_of(name: str, **fields: Any) -> Any:
    """An object as a model's latent_format, which is told by the name of its class."""
    space = LatentSpace.get(FORMATS[name].space) if name in FORMATS else None
    patched = name in FORMATS and FORMATS[name].layout == "patches"

    def process_in(self: Any, latent: torch.Tensor) -> torch.Tensor:
        if space is None or FORMATS[name].scaled:
            return latent
        if FORMATS[name].frames:
            return space.to_scaled(latent[:, :, 0])[:, :, None]
        return space.to_scaled(latent)

    if space is not None:
        fields = {
            "latent_channels": space.packed_channels if patched else space.channels,
            "process_in": process_in,
            **fields,
        }
    return type(name, (), fields)()


class Model:
    """What `read` asks of a MODEL."""

    def __init__(self, latent_format: Any) -> None:
        self.latent_format = latent_format

    def get_model_object(self, name: str) -> Any:
        return getattr(self, name)


@pytest.mark.parametrize("space", BY_SPACE)
def test_what_is_read_has_the_space_and_goes_back_as_it_came(space: str) -> None:
    held = BY_SPACE[space]
    known = LatentSpace.get(space)
    channels = known.packed_channels if held.layout == "patches" else known.channels
    shape = (2, channels, 1, 4, 6) if held.frames else (2, channels, 4, 6)
    given = torch.randn(shape)
    latents, tensor = read({"samples": given}, space)
    assert latents.space.name == known.name
    assert latents.scaled is held.scaled
    assert latents.layout == "spatial"
    assert torch.equal(tensor, given)
    assert tensor.data_ptr() != given.data_ptr()
    assert torch.equal(tensor_like(latents, held, given), given)


def test_flux2_is_held_as_patches_that_are_scaled() -> None:
    expected = bundled("revolver")
    patches = LatentSpace.get("flux2").patchify(expected.tensor)
    for space in ("flux2", "auto"):
        latents, _ = read({"samples": patches}, space)
        assert latents.scaled
        assert torch.equal(latents.tensor, expected.tensor)


def test_auto_tells_a_picture_by_its_statistics() -> None:
    latents, _ = read({"samples": raw("sdxl", "revolver", "cat", "rocket", "pagoda")})
    assert latents.space.name == "sdxl"
    assert not latents.scaled


@pytest.mark.parametrize("channels", [4, 7, 16, 48])
def test_auto_asks_where_that_is_not_certain(channels: int) -> None:
    with pytest.raises(LatentsError, match="choose it in `space`, or connect the model"):
        read({"samples": torch.randn(1, channels, 32, 32)})


@pytest.mark.parametrize(
    "latent",
    [
        None,
        {},
        {"samples": None},
        {"samples": [torch.zeros(1, 4, 8, 8)]},
        {"samples": torch.zeros(1, 4, 8, 8).to_sparse()},
        {"samples": torch.nn.Parameter(torch.zeros(1, 4, 8, 8))},
    ],
)
def test_what_is_no_latent_is_refused(latent: Any) -> None:
    with pytest.raises(LatentsError, match="must hold a tensor `samples`"):
        tensor_of(latent)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(1, 16, 8, 8), "latents must be"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.int64), "floating point"),
        (torch.zeros(0, 4, 8, 8), "must not be empty"),
        (torch.zeros(1, 4, 3, 8, 8), "latents of a video"),
        (torch.zeros(4, 8), "latents must be"),
    ],
)
def test_what_is_no_image_of_the_space_is_refused(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(LatentsError, match=says):
        read({"samples": tensor}, "sdxl")


def test_a_space_that_comfyui_holds_in_an_unknown_way_is_refused() -> None:
    with pytest.raises(LatentsError, match="`space` must be one of auto"):
        read({"samples": torch.zeros(1, 32, 8, 8)}, "sana")


SIDE = st.integers(0, 6)
SHAPES = st.lists(SIDE, max_size=2) | st.builds(
    lambda count, channels, rest: [count, channels, *rest],
    SIDE,
    st.sampled_from([3, 4, 12, 16, 32, 48, 64, 128]),
    st.lists(SIDE, max_size=4),
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


@settings(deadline=None, max_examples=200)
@given(SHAPES, st.sampled_from([*DTYPES, torch.complex64]), st.sampled_from(SPACE_CHOICES))
def test_any_tensor_is_read_or_refused(shape: list[int], dtype: torch.dtype, space: str) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    try:
        latents, copy = read({"samples": tensor}, space)
    except LatentsError:
        return
    assert latents.tensor.numel() == copy.numel() == tensor.numel()
    assert latents.space.name in space
    assert len(latents) == len(tensor)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_says_the_space(name: str) -> None:
    assert held_by(format_of(name)) == FORMATS[name]


def test_a_model_goes_before_statistics_and_may_not_contradict() -> None:
    model = Model(format_of("SD15"))
    latents, _ = read({"samples": torch.randn(1, 4, 8, 8)}, "auto", model)
    assert latents.space.name == "sd1"
    with pytest.raises(LatentsError, match="`space` says sdxl, and the model denoises sd1"):
        read({"samples": torch.randn(1, 4, 8, 8)}, "sdxl", model)


def test_a_format_of_a_known_name_with_other_numbers_is_refused() -> None:
    with pytest.raises(LatentsError, match="scales latents otherwise than space sdxl"):
        held_by(format_of("SDXL", process_in=lambda self, latent: latent * 0.18215))
    with pytest.raises(LatentsError, match="has 8 channels, space sdxl 4"):
        held_by(format_of("SDXL", latent_channels=8))
    with pytest.raises(LatentsError, match="latent format SC_B is not known"):
        held_by(format_of("SC_B"))


def test_a_samplers_tensor_is_scaled_whatever_a_latent_is() -> None:
    assert latents_of(torch.zeros(1, 4, 8, 8), BY_SPACE["sdxl"], scaled=True).scaled
