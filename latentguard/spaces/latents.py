"""Latents: a tensor that carries its space, scaling and layout, so that they are never guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from latentguard.deprecated import Former
from latentguard.errors import LatentsError
from latentguard.spaces import scaling
from latentguard.spaces.space import BatchNorm, LatentSpace, at_least_single
from latentguard.spaces.tokens import check_size

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["spatial", "packed", "patches"]


class Latents:
    """A batch of latents of one space, one scaling and one layout.

    Attributes:
        tensor: float [B, C, H, W] (spatial), tokens [B, H/2 * W/2, C * 4] (packed) or
            [B, C * 4, H/2, W/2] (patches). An axis of one frame, [B, C, 1, H, W], is dropped.
        space: the LatentSpace; a name is looked up.
        scaled: True for latents as the diffusion model denoises them, False for latents as the VAE
            encodes and decodes them. There is no default: the two differ by a factor of 8 in sdxl,
            and a wrong value fails silently.
        layout: "spatial", "packed" or "patches".
        height, width: size in latent cells; required if packed.
        ids: one name per image, or None.

    Raises:
        LatentsError: the tensor is not floating point or is empty, or its shape does not fit.
    """

    __slots__ = ("height", "ids", "layout", "scaled", "space", "tensor", "width")

    def __init__(
        self,
        tensor: Tensor,
        space: str | LatentSpace,
        scaled: bool,
        layout: Layout = "spatial",
        height: int | None = None,
        width: int | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.tensor = tensor
        self.space = LatentSpace.get(space)
        self.scaled = scaled
        self.layout: Layout = layout
        self._check_tensor()
        self.tensor = tensor = self._one_frame(tensor)
        self.height, self.width = self.space.size(tensor.shape, layout, height, width)
        self.ids = None if ids is None else tuple(ids)
        if self.ids is not None and len(self.ids) != len(self):
            raise LatentsError(f"{len(self)} latents need as many ids, got {len(self.ids)}")

    def _one_frame(self, tensor: Tensor) -> Tensor:
        """[B, C, 1, H, W] as [B, C, H, W], a view. LatentsError for more frames."""
        if tensor.ndim != 5 or self.layout == "packed":
            return tensor
        if tensor.shape[2] != 1:
            raise LatentsError(
                f"latents of a video are not images ({tensor.shape[2]} frames, got shape "
                f"{list(tensor.shape)}): only one can be judged"
            )
        return tensor.squeeze(2)

    def _check_tensor(self) -> None:
        from torch import is_tensor

        tensor: Any = self.tensor
        if not is_tensor(tensor):
            raise LatentsError(f"latents must be a torch.Tensor, got {type(tensor).__name__}")
        if not isinstance(self.scaled, bool):
            raise LatentsError(
                f"scaled must be True (as the model denoises) or False (as the VAE encodes), got "
                f"{self.scaled!r}"
            )
        if self.layout not in ("spatial", "packed", "patches"):
            raise LatentsError(f"layout must be spatial, packed or patches, got {self.layout!r}")
        if not tensor.is_floating_point():
            raise LatentsError(f"latents must be floating point, got {dtype_name(tensor)}")
        if tensor.numel() == 0:
            raise LatentsError(f"latents must not be empty, got shape {list(tensor.shape)}")

    # -- conventions -------------------------------------------------------------------------

    def to_raw(self, batch_norm: BatchNorm | None = None) -> Latents:
        """These latents as the VAE encodes them (self if they are raw).

        flux2 needs `batch_norm` unless the space carries it. The space of the result carries it.
        """
        return self._converted(False, batch_norm)

    def to_scaled(self, batch_norm: BatchNorm | None = None) -> Latents:
        """These latents as the diffusion model denoises them (self if they are scaled)."""
        return self._converted(True, batch_norm)

    def to_standard(self, scaled: bool = True) -> Latents:
        """These latents as encoders read them: raw, or in the usual scaling of their space.

        A space may have a scaling of its own, such as Playground 2.5's. Returns self if nothing
        changes, else spatial latents in float32 (or float64). Differentiable.

        Raises LatentsError for flux2 without its batch-norm statistics.
        """
        if self.is_standard(scaled):
            return self
        standard = self.space.standard
        numbers = at_least_single(self.to_spatial().tensor)
        converted = scaling.to_standard(numbers, self.space, standard, self.scaled, scaled)
        space = self.space if standard.scale is None or not scaled else standard
        return Latents(converted, space, scaled, ids=self.ids)

    def is_standard(self, scaled: bool = True) -> bool:
        """Whether `to_standard` changes nothing."""
        return scaling.is_standard(self.space, self.space.standard, self.scaled, scaled)

    def affine(self, scaled: bool = True) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """`to_standard` as tensor * scale + shift, with one number for each channel of spatial
        latents.

        None if nothing changes, or if there is not one number for each channel. Raises as
        `to_standard` does.
        """
        return scaling.affine(self.space, self.space.standard, self.scaled, scaled)

    def _converted(self, scaled: bool, batch_norm: BatchNorm | None) -> Latents:
        if self.scaled is scaled:
            return self
        space = self.space if batch_norm is None else self.space.with_batch_norm(*batch_norm)
        if self.layout != "spatial":
            converted = self.to_spatial()._converted(scaled, batch_norm)
            return converted.to_packed() if self.layout == "packed" else converted
        convert = space.to_scaled if scaled else space.to_raw
        return Latents(convert(self.tensor), space, scaled, ids=self.ids)

    def to_spatial(self) -> Latents:
        """The same latents as [B, C, H, W] (self if they are spatial)."""
        if self.layout == "spatial":
            return self
        if self.layout == "patches":
            tensor = self.space.unpatchify(self.tensor)
        else:
            tensor = self.space.to_spatial(self.tensor, self.height, self.width)
        return Latents(tensor, self.space, self.scaled, ids=self.ids)

    def check_size(self) -> None:
        """Raises LatentsError if the numbers of packed latents contradict their height and width.

        In pictures the rows of tokens continue each other. Noise and flat latents contradict
        nothing.
        """
        if self.layout == "packed":
            tokens = self.space.canonical(self.tensor.detach().float().cpu().numpy())
            check_size(tokens, self.space, self.height, self.width)

    def to_packed(self) -> Latents:
        """The same latents as tokens [B, H/2 * W/2, C * 4] (self when they are)."""
        if self.layout == "packed":
            return self
        return self._like(self.space.to_packed(self.to_spatial().tensor), self.ids, layout="packed")

    raw, scaled_, standard = Former("to_raw"), Former("to_scaled"), Former("to_standard")
    spatial, packed = Former("to_spatial"), Former("to_packed")

    # -- a batch -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    @overload
    def __getitem__(self, index: int) -> Latents: ...
    @overload
    def __getitem__(self, index: slice) -> Latents: ...
    def __getitem__(self, index: int | slice) -> Latents:
        """Some of the images; one index gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for {len(self)} latents")
            start = index % len(self)
            index = slice(start, start + 1)
        return self._like(self.tensor[index], None if self.ids is None else self.ids[index])

    def pick(self, rows: Sequence[int]) -> Latents:
        """The images at these indices, in their order."""
        from torch import tensor

        index = tensor(rows, device=self.tensor.device)
        return self._like(
            self.tensor[index], None if self.ids is None else [self.ids[row] for row in rows]
        )

    def __iter__(self) -> Iterator[Latents]:
        return (self[index] for index in range(len(self)))

    @staticmethod
    def cat(batches: Sequence[Latents]) -> Latents:
        """One batch from several of the same space, scaling, layout and size.

        Ids are kept if every batch has them.
        """
        from torch import cat

        if not batches:
            raise LatentsError("nothing to concatenate: give at least one Latents")
        first = batches[0]
        for other in batches[1:]:
            if other._convention() != first._convention():
                raise LatentsError(f"cannot concatenate {first!r} and {other!r}")
        ids: tuple[str, ...] | None = None
        if all(batch.ids is not None for batch in batches):
            ids = tuple(name for batch in batches for name in batch.ids or ())
        return first._like(cat([batch.tensor for batch in batches]), ids)

    def to(self, *args: Any, **kwargs: Any) -> Latents:
        """`tensor.to(...)`, everything else unchanged: a device, a floating dtype, or both."""
        return self._like(self.tensor.to(*args, **kwargs), self.ids)

    def _like(
        self, tensor: Tensor, ids: Sequence[str] | None, layout: Layout | None = None
    ) -> Latents:
        return Latents(
            tensor, self.space, self.scaled, layout or self.layout, self.height, self.width, ids
        )

    def _convention(self) -> tuple[Any, ...]:
        return self.space, self.scaled, self.layout, self.height, self.width

    def __repr__(self) -> str:
        convention = "scaled" if self.scaled else "raw"
        return (
            f"Latents({self.space} {convention} {self.layout}, {len(self)} of "
            f"{self.height}x{self.width} cells, {dtype_name(self.tensor)})"
        )


def dtype_name(tensor: Tensor) -> str:
    """The dtype as users write it: float32 instead of torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")
