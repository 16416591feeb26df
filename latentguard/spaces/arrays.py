"""LatentArray: latents as NumPy, with their convention, for everything that runs without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentguard.deprecated import Former
from latentguard.errors import LatentsError
from latentguard.spaces import scaling
from latentguard.spaces.space import LatentSpace
from latentguard.spaces.tokens import check_size

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

    Raises LatentsError where the array is not floating, is empty, has masked numbers, or is not of
    the space's shape.
    """

    array: NDArray[Any]
    space: LatentSpace
    scaled: bool
    ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.array.dtype not in _FLOATS:
            raise LatentsError(f"latents must be floating point, got {self.array.dtype}")
        check_unmasked(self.array)
        if not isinstance(self.scaled, bool):
            raise LatentsError(
                f"scaled must be True (as the model denoises) or False (as the VAE encodes), got "
                f"{self.scaled!r}"
            )
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

    def to_scaled(self) -> LatentArray:
        """As the diffusion model denoises them, float32 (self when they are scaled).

        Raises LatentsError for flux2 without its batch-norm statistics.
        """
        if self.scaled:
            return self
        return self._like(scaling.to_scaled(_exact(self.array), self.space), self.space, True)

    def to_raw(self) -> LatentArray:
        """As the VAE encodes them, float32 (self when they are raw). Raises as `to_scaled` does."""
        if not self.scaled:
            return self
        return self._like(scaling.to_raw(_exact(self.array), self.space), self.space, False)

    def to_standard(self, scaled: bool = True) -> LatentArray:
        """As encoders read them: raw, or in the scaling that `SPACES` gives the space; float32.

        A space may have a scaling of its own, as Playground 2.5's. Self where nothing changes.
        Raises as `to_scaled` does.
        """
        standard = self.space.standard
        if scaling.is_standard(self.space, standard, self.scaled, scaled):
            return self
        numbers = _exact(self.array)
        converted = scaling.to_standard(numbers, self.space, standard, self.scaled, scaled)
        space = self.space if standard.scale is None or not scaled else standard
        return self._like(converted, space, scaled)

    def to_torch(self) -> Latents:
        """The same as `Latents`, in the same dtype; the numbers are shared where they can be."""
        import torch

        from latentguard.spaces.latents import Latents

        if self.array.dtype == BFLOAT16:
            bits = np.ascontiguousarray(self.array).view(np.int16)
            tensor = torch.from_numpy(bits).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(np.ascontiguousarray(self.array))
        return Latents(tensor, self.space, self.scaled, ids=self.ids)

    raw, scaled_, standard = Former("to_raw"), Former("to_scaled"), Former("to_standard")
    torch = Former("to_torch")

    @staticmethod
    def cat(batches: Sequence[LatentArray]) -> LatentArray:
        """One batch of several of the same space, scaling, size and dtype, without their ids."""
        first = batches[0]
        if any((one.space, one.scaled) != (first.space, first.scaled) for one in batches):
            raise LatentsError("latents of several spaces or scalings are no batch: convert them")
        array = np.concatenate([batch.array for batch in batches])
        return LatentArray(array, first.space, first.scaled)

    def _like(self, array: NDArray[Any], space: LatentSpace, scaled: bool) -> LatentArray:
        return LatentArray(array.astype(np.float32, copy=False), space, scaled, self.ids)


def _exact(array: NDArray[Any]) -> NDArray[Any]:
    """Half precision as float32, in which conversions are computed."""
    wide = widened(array)
    return wide.astype(np.promote_types(wide.dtype, np.float32), copy=False)


def check_unmasked(array: Any) -> None:
    """LatentsError for a masked array: what lies under a mask is not what its owner sees."""
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise LatentsError(
            "latents must have all of their numbers, this array masks some: give array.filled(...) "
            "with the numbers that are decoded"
        )


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
    """Tokens [B, H/2 * W/2, C * 4], channels in the space's `packed_order`, as [B, C, H, W].

    height, width: in latent cells. Raises LatentsError where they do not fit, are not given, or
    are denied by the numbers (tokens.py).
    """
    height, width = space.size(tokens.shape, "packed", height, width)
    tokens = space.canonical(tokens)
    check_size(widened(tokens), space, height, width)
    patch = space.packed_patch
    cells = tokens.reshape(-1, height // patch, width // patch, space.channels, patch, patch)
    return cells.transpose(0, 3, 1, 4, 2, 5).reshape(-1, space.channels, height, width)


def unpatchify(patches: NDArray[Any], space: LatentSpace) -> NDArray[Any]:
    """[B, C * 4, H/2, W/2], channel c * 4 + dy * 2 + dx, as [B, C, H, W]. Raises LatentsError."""
    height, width = space.size(patches.shape, "patches", None, None)
    patch = space.packed_patch
    cells = patches.reshape(-1, space.channels, patch, patch, height // patch, width // patch)
    return cells.transpose(0, 1, 4, 2, 5, 3).reshape(-1, space.channels, height, width)
