"""LatentArray: latents as NumPy, with their convention, for everything that runs without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentsError
from latentguard.spaces.space import SPACES, LatentSpace

if TYPE_CHECKING:
    from latentguard.spaces.latents import Latents

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""The bits of a bfloat16, a type that NumPy does not have."""

_FLOATS = (np.dtype("f2"), np.dtype("f4"), np.dtype("f8"), BFLOAT16)


@dataclass(frozen=True, eq=False)
class LatentArray:
    """A batch of latents of one space, one scaling and one size.

    array: [B, C, H, W], float16, float32, float64 or `BFLOAT16`.
    space, scaled: as in `Latents`.
    ids: one name per image, or None.

    Raises LatentsError where the array is not floating, is empty, or is not of the space's shape.
    """

    array: NDArray[Any]
    space: LatentSpace
    scaled: bool
    ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.array.dtype not in _FLOATS:
            raise LatentsError(f"latents must be floating point, got {self.array.dtype}")
        if self.array.size == 0:
            raise LatentsError(f"latents must not be empty, got shape {list(self.array.shape)}")
        self.space.size(self.array.shape, "spatial", None, None)

    @property
    def height(self) -> int:
        return int(self.array.shape[2])

    @property
    def width(self) -> int:
        return int(self.array.shape[3])

    def __len__(self) -> int:
        return len(self.array)

    def scaled_(self) -> LatentArray:
        """As the diffusion model denoises them, float32 (self when they are scaled).

        Raises LatentsError for flux2 without its batch-norm statistics.
        """
        if self.scaled:
            return self
        scale, shift = self._factors("scaled")
        return self._like((widened(self.array) - shift) * scale, True)

    def raw(self) -> LatentArray:
        """As the VAE encodes them, float32 (self when they are raw). Raises as `scaled_` does."""
        if not self.scaled:
            return self
        scale, shift = self._factors("raw")
        return self._like(widened(self.array) / scale + shift, False)

    def standard(self) -> LatentArray:
        """As `scaled_`, by the scaling that `SPACES` gives the space: files may have their own.

        Raises as `scaled_` does.
        """
        space = SPACES[self.space.name]
        own = (self.space.scale, self.space.shift) != (space.scale, space.shift)
        if not own or space.scale is None:
            return self.scaled_()
        return LatentArray(self.raw().array, space, False, self.ids).scaled_()

    def torch(self) -> Latents:
        """The same as `Latents`, in the same dtype; the numbers are shared where they can be."""
        import torch

        from latentguard.spaces.latents import Latents

        if self.array.dtype == BFLOAT16:
            bits = np.ascontiguousarray(self.array).view(np.int16)
            tensor = torch.from_numpy(bits).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(np.ascontiguousarray(self.array))
        return Latents(tensor, self.space, self.scaled, ids=self.ids)

    @staticmethod
    def cat(batches: Sequence[LatentArray]) -> LatentArray:
        """One batch of several of the same space, scaling, size and dtype, without their ids."""
        first = batches[0]
        array = np.concatenate([batch.array for batch in batches])
        return LatentArray(array, first.space, first.scaled)

    def _like(self, array: NDArray[Any], scaled: bool) -> LatentArray:
        return LatentArray(array.astype(np.float32), self.space, scaled, self.ids)

    def _factors(self, wanted: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        space = self.space
        if space.scale is None or space.shift is None:
            raise LatentsError(
                f"space {space.name}: {wanted} latents need the batch-norm statistics of the "
                "pipeline's VAE, which files do not carry"
            )
        return self._spread(space.scale), self._spread(space.shift)

    def _spread(self, factors: float | tuple[float, ...]) -> NDArray[np.float32]:
        """Factors in a shape that broadcasts over [B, C, H, W]."""
        values = np.asarray(factors, np.float32)
        if values.size in (1, self.space.channels):
            return values.reshape(-1, 1, 1)
        # One for each packed channel: they tile the image, see `unpack`.
        patch = self.space.packed_patch
        self.space.check_even(self.height, self.width)
        block = values.reshape(self.space.channels, patch, patch)
        return np.tile(block, (1, self.height // patch, self.width // patch))


def native(array: NDArray[Any]) -> NDArray[Any]:
    """A contiguous copy in this machine's byte order; `BFLOAT16` is read by `widened` only."""
    kind = array.dtype if array.dtype == BFLOAT16 else array.dtype.newbyteorder("=")
    return array.astype(kind, order="C")


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """`BFLOAT16` as float32, which holds each of its numbers; other dtypes as they are."""
    if array.dtype != BFLOAT16:
        return array
    return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)


def unpack(
    tokens: NDArray[Any], space: LatentSpace, height: int | None, width: int | None
) -> NDArray[Any]:
    """Tokens [B, H/2 * W/2, C * 4], channel c * 4 + dy * 2 + dx, as [B, C, H, W].

    height, width: in latent cells. Raises LatentsError where they do not fit, or are not given.
    """
    height, width = space.size(tokens.shape, "packed", height, width)
    patch = space.packed_patch
    cells = tokens.reshape(-1, height // patch, width // patch, space.channels, patch, patch)
    return cells.transpose(0, 3, 1, 4, 2, 5).reshape(-1, space.channels, height, width)
