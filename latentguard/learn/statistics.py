"""What a head is solved from: counts, means and scatter of feature vectors, which add up.

Of a set of vectors these three are kept. Those of two sets give those of both together exactly
(Chan, Golub and LeVeque 1979), so examples can be added without the ones before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sums:
    """Count, mean and scatter of feature vectors.

    count: how many there were.
    mean: [F] float64.
    factor: [r, F] float64, r at most count and F: factor.T @ factor is the sum of
        (x - mean) (x - mean).T over the vectors.
    """

    count: int
    mean: Array
    factor: Array

    @classmethod
    def of(cls, rows: ArrayLike) -> Self:
        """Those of vectors [n, F], n at least 1."""
        values = np.asarray(rows, np.float64)
        mean = values.mean(0)
        return cls(len(values), mean, _compressed(values - mean))

    def __add__(self, other: Sums) -> Sums:
        """Those of both sets together."""
        count = self.count + other.count
        share = other.count / count
        apart = other.mean - self.mean
        between = (self.count * share) ** 0.5 * apart
        factor = _compressed(np.concatenate([self.factor, other.factor, between[None]]))
        return Sums(count, self.mean + share * apart, factor)

    def to_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """As a file keeps them: the scatter in float32."""
        return {
            f"{name}.count": np.array([self.count], np.int64),
            f"{name}.mean": self.mean,
            f"{name}.factor": self.factor.astype(np.float32),
        }

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Raises ValueError or KeyError for arrays that `to_arrays` did not make."""
        count, mean, factor = (arrays[f"{name}.{key}"] for key in ("count", "mean", "factor"))
        fits = mean.ndim == 1 and factor.ndim == 2 and factor.shape[1] == len(mean)
        if count.shape != (1,) or count[0] < 1 or not fits or len(factor) > max(mean.shape):
            raise ValueError(f"the sums of its {name} do not fit together")
        return cls(int(count[0]), mean.astype(np.float64), factor.astype(np.float64))


def _compressed(factor: Array) -> Array:
    """A factor of the same scatter with no more rows than columns."""
    if len(factor) <= factor.shape[1]:
        return factor
    upper: Array = np.asarray(np.linalg.qr(factor, mode="r"))
    return upper
