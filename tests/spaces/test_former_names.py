"""What the conversions were called before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from latentguard.deprecated import UNTIL
from latentguard.spaces import SPACES, LatentArray, Latents

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
        (lambda: FLUX1.unpack(PACKED.tensor, 4, 6), lambda: RAW),
    ],
)
def test_former_names(former: Callable[[], Any], present: Callable[[], Any]) -> None:
    with pytest.warns(DeprecationWarning, match=UNTIL) as caught:
        old = former()
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert np.array_equal(numbers(old), numbers(present()))


def numbers(found: Any) -> Any:
    return found.array if isinstance(found, LatentArray) else getattr(found, "tensor", found)
