"""What the conversions were called before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from latentguard import spaces
from latentguard.deprecated import UNTIL
from latentguard.spaces import SPACES, LatentArray, Latents, LatentSpace

FLUX1 = SPACES["flux1"]
RAW = torch.randn(1, 16, 4, 6)
SPATIAL = Latents(RAW, "flux1", scaled=False)
PACKED = SPATIAL.to_packed()
ARRAY = LatentArray(RAW.numpy(), FLUX1, scaled=False)


@pytest.mark.parametrize(
    ("former", "present"),
    [
        (lambda: SPATIAL.scaled_(), lambda: SPATIAL.to_scaled()),
        (lambda: SPATIAL.to_scaled().raw(), lambda: SPATIAL.to_scaled().to_raw()),
        (lambda: SPATIAL.standard(), lambda: SPATIAL.to_standard()),
        (lambda: SPATIAL.packed(), lambda: PACKED),
        (lambda: PACKED.spatial(), lambda: SPATIAL),
        (lambda: ARRAY.scaled_(), lambda: ARRAY.to_scaled()),
        (lambda: ARRAY.to_scaled().raw(), lambda: ARRAY.to_scaled().to_raw()),
        (lambda: ARRAY.standard(), lambda: ARRAY.to_standard()),
        (lambda: ARRAY.torch(), lambda: SPATIAL),
        (lambda: FLUX1.pack(RAW), lambda: PACKED.tensor),
        (lambda: FLUX1.factor, lambda: 8),
        (lambda: spaces.recognise(RAW).space, lambda: spaces.recognize(RAW).space),
        (lambda: FLUX1.unpack(PACKED.tensor, 4, 6), lambda: RAW),
    ],
)
def test_former_names(former: Callable[[], Any], present: Callable[[], Any]) -> None:
    with pytest.warns(DeprecationWarning, match=UNTIL) as caught:
        old = former()
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert np.array_equal(numbers(old), numbers(present()))


def test_the_former_keyword_of_the_pixels_of_a_cell() -> None:
    arguments: dict[str, Any] = {"name": "mine", "channels": 1, "scale": 1.0, "shift": 0.0}
    with pytest.warns(DeprecationWarning, match="argument factor is called vae_scale_factor now"):
        assert LatentSpace(**arguments, factor=16) == LatentSpace(**arguments, vae_scale_factor=16)
    with pytest.raises(TypeError, match="give one"):
        replace(FLUX1, factor=16)  # type: ignore[call-arg]


def numbers(found: Any) -> Any:
    return found.array if isinstance(found, LatentArray) else getattr(found, "tensor", found)
