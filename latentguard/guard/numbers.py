"""The numbers of a VAE's config by which pipelines scale its latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentguard.spaces import LatentSpace


@dataclass(frozen=True)
class Numbers:
    """scaled = (raw - mean) * factor / std, or (raw - shift) * factor where there is no mean.

    factor, shift: `scaling_factor` and `shift_factor`, None where the config has none.
    mean, std: `latents_mean` and `latents_std`, [C], in the dtype that `torch.tensor` gives them.
    """

    factor: float | None = None
    shift: float | None = None
    mean: Tensor | None = None
    std: Tensor | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Numbers | None:
        """Those of a config, None where it has none, or others than numbers."""
        factor, shift, mean, std = (
            config.get(name)
            for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        )
        if not all(value is None or isinstance(value, int | float) for value in (factor, shift)):
            return None
        if mean is None or std is None:
            return None if factor is None else cls(factor, shift)
        try:
            mean, std = (torch.tensor(values).flatten() for values in (mean, std))
        except (TypeError, ValueError):
            return None
        return cls(factor, shift, mean, std)

    def scale_as(self, space: LatentSpace) -> bool:
        """Whether a space is scaled by these numbers, but for rounding."""
        factor = 1.0 if self.factor is None else self.factor
        if self.mean is None or self.std is None:
            own: tuple[Any, Any] = (factor, self.shift or 0.0)
        else:
            own = (factor / self.std, self.mean)
        return all(
            _close(ours, its) for ours, its in zip(own, (space.scale, space.shift), strict=True)
        )


def _close(ours: Any, its: Any) -> bool:
    if its is None:
        return False
    a, b = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in (ours, its))
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        return False
    return bool(torch.isclose(a, b, rtol=1e-4, atol=1e-6).all())
