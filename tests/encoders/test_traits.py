"""What an encoder says of its own kind, which exports and the hub ask instead of its class."""

from __future__ import annotations

import pytest
import torch
from clip_reference import SMALL_B8

from latentguard.encoders import Encoder, load_encoder, traits
from latentguard.encoders.latent_clip import LatentCLIP


class Silent:
    """An encoder of somebody else's, from before there was anything to say."""


def test_an_encoder_that_says_nothing_is_like_most() -> None:
    silent: Encoder = Silent()  # type: ignore[assignment]
    kind = traits(silent)
    assert (kind.fixed_size, kind.merges, kind.variant, kind.module) == (False, False, False, None)


def test_nano_is_of_one_size_and_its_own_module() -> None:
    encoder = load_encoder("nano-sdxl", "cpu")
    kind = traits(encoder)
    assert kind is encoder
    assert kind.fixed_size
    assert kind.module is encoder
    assert not kind.merges


@pytest.mark.parametrize(
    ("resize", "fixed"), [("interpolate", False), ("pool", True), ("tile", True)]
)
def test_latent_clip_is_of_one_size_where_it_resizes(resize: str, fixed: bool) -> None:
    kind = traits(LatentCLIP.random(SMALL_B8, resize=resize))  # type: ignore[arg-type]
    assert kind.fixed_size is fixed
    assert isinstance(kind.module, torch.nn.Module)


def test_a_variant_is_the_published_model_for_a_while() -> None:
    encoder = LatentCLIP.random(SMALL_B8, merge=0.25)
    kind = traits(encoder)
    assert kind.variant
    assert encoder.name.endswith("+merge=0.25")
    with kind.published():
        assert not kind.variant
        assert "+merge" not in encoder.name
    assert kind.merge == 0.25
    with pytest.raises(ZeroDivisionError), kind.published():
        raise ZeroDivisionError
    assert kind.merge == 0.25
