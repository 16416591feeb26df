"""What a guarded pipeline returns: blanks in place of the images that are blocked."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentguard.errors import GuardError, LatentGuardError, LatentsError
from latentguard.guard.components import decoder_of
from latentguard.guard.layout import Layout
from latentguard.guard.record import CallRecord
from latentguard.guard.tensors import private
from latentguard.judge import Verdict

_NSFW = "nsfw_content_detected"
IMAGES = ("images", "image")
"""The names under which outputs have their images."""


class GenerationBlocked(LatentGuardError):  # noqa: N818 (an outcome, not a fault)
    """Raised where a policy says `on_block: raise`, and where a blocked image cannot be blanked.

    verdicts: one for each image of the call. output: what the pipeline would have returned, the
        blocked images blank; None where there is nothing to be returned.
    """

    def __init__(self, verdicts: list[Verdict], output: Any = None) -> None:
        self.verdicts = verdicts
        self.output = output
        blocked = [i for i, verdict in enumerate(verdicts) if verdict.decision == "block"]
        first = verdicts[blocked[0]].reason if blocked else "blocked"
        super().__init__(f"{len(blocked)} of {len(verdicts)} images were blocked; {first}")


def images_of(output: Any) -> Any:
    """The images of a pipeline's output, or None where it has none."""
    if isinstance(output, tuple):
        return output[0] if output else None
    if isinstance(output, list | Tensor | np.ndarray):
        return output
    name = _name_of_images(output)
    return output.get(name) if _is_mapping(output) else getattr(output, name, None)


def count_of(output: Any) -> int | None:
    """How many images an output has, None where that is not plain."""
    try:
        return len(images_of(output))
    except TypeError:
        return None


def with_images(output: Any, images: Any) -> Any:
    """The output with other images."""
    if isinstance(output, tuple):
        return (images, *output[1:])
    if isinstance(output, list | Tensor | np.ndarray):
        return images
    name = _name_of_images(output)
    if _is_mapping(output):
        return {**output, name: images}
    setattr(output, name, images)
    if getattr(output, name) is not images:
        raise LatentsError(
            f"a {type(output).__name__} does not keep the images that it is given, so what is "
            "blocked in it cannot be taken out, and it is withheld"
        )
    return output


def _name_of_images(output: Any) -> str:
    names = output if _is_mapping(output) else [one for one in IMAGES if hasattr(output, one)]
    return next((name for name in IMAGES if name in names), "images")


def _is_mapping(output: Any) -> bool:
    return isinstance(output, Mapping) and not any(hasattr(output, name) for name in IMAGES)


def latents_in(images: Any, layout: Layout) -> Tensor | None:
    """A copy of the latents that "images" are by their shape, in one of the layout's forms.

    images: a tensor, an array, or a list of either; one image may come without B. None for pixels
    and what is neither.
    """
    if isinstance(images, list) and images and all(_is_array(one) for one in images):
        if len({tuple(one.shape) for one in images}) > 1:
            return None
        images = [private(torch.as_tensor(one)) for one in images]
        images = torch.cat(images) if images[0].ndim == 4 else torch.stack(images)
    if isinstance(images, np.ndarray):
        if images.shape[-1:] == (3,) or images.dtype.kind != "f":
            return None
        images = torch.from_numpy(images.copy())
    if not isinstance(images, Tensor):
        return None
    if images.ndim == 3 and images.shape[0] == layout.space.channels:
        images = images[None]
    return private(images) if images.is_floating_point() and layout.fits(images) else None


def check_pixels(images: Any, pipe: Any) -> None:
    """Raises LatentsError for "images" in which there may be what nobody looked at.

    Tensors and arrays that have the form of neither pixels nor latents, in lists and tuples too,
    and what would make its images only once they are asked for (generators, functions).
    """
    if isinstance(images, list | tuple):
        for one in images:
            check_pixels(one, pipe)
        return
    if _is_array(images):
        shape = tuple(images.shape)
        if _are_pixels(shape, pipe):
            return
        what = f"an array {list(shape)}, which has the form of neither pixels nor its latents"
    elif isinstance(images, Iterator) or callable(images):
        what = f"a {type(images).__name__}, which makes its images only later"
    else:
        return
    raise LatentsError(
        f"{type(pipe).__name__} returned as its images {what}, so it cannot be told whether they "
        "were judged, and they are withheld: return a list of images, or [B, H, W, 3] or "
        "[B, 3, H, W]"
    )


def _are_pixels(shape: tuple[int, ...], pipe: Any) -> bool:
    """Whether a shape is [..., H, W, C] or [..., C, H, W] of colors or of what the VAE draws.

    Gray images have one channel.
    """
    channels = {3, drawn_channels(pipe)}
    if len(shape) <= 4:
        channels.add(1)
    return len(shape) > 2 and bool({shape[-1], shape[-3]} & channels)


def drawn_channels(pipe: Any) -> int:
    """How many channels the images have that a pipeline's VAE draws: 3 where it does not say."""
    config = getattr(decoder_of(pipe), "config", {})
    channels, patch = config.get("out_channels", 3), config.get("patch_size")
    return int(channels // patch**2 if isinstance(patch, int) else channels)


def _is_array(image: Any) -> bool:
    return isinstance(image, Tensor | np.ndarray)


def in_form_of(images: Any, latents: Tensor) -> Any:
    """Latents as `latents_in` made them of `images`, in the form that these had."""
    if isinstance(images, list):
        rows = latents.reshape(len(images), *images[0].shape)
        return [in_form_of(one, row) for one, row in zip(images, rows, strict=True)]
    latents = latents.reshape(images.shape)
    return latents.cpu().numpy() if isinstance(images, np.ndarray) else latents


class OutputTuple(tuple[Any, ...]):
    """What a pipeline returns with return_dict=False, and as `latentguard` what was said of it."""

    latentguard: CallRecord


def with_record(output: Any, record: CallRecord) -> Any:
    """The output with `record` as its attribute `latentguard`; as it is where it takes none."""
    if isinstance(output, tuple):
        output = OutputTuple(output)
    with contextlib.suppress(AttributeError, TypeError):
        output.latentguard = record
    return output


def flagged(output: Any, rows: Sequence[int], count: int, cls: Any) -> Any:
    """The output with a flag for each image in `nsfw_content_detected`, where it has that: True for
    `rows`, and as they were for the others.

    cls: the output's class, which names what a tuple holds.
    """
    flags = flags_of(output, count, cls)
    if flags is None:
        return output
    for row in rows:
        flags[row] = True
    return _with_flags(output, flags, cls)


def flags_of(output: Any, count: int, cls: Any) -> list[Any] | None:
    """A flag for each image as an output has them, False where it has none; None where it has no
    place for them."""
    if isinstance(output, tuple):
        index = _index_of_flags(cls)
        if index is None or index >= len(output):
            return None
        found = output[index]
    elif hasattr(output, _NSFW):
        found = getattr(output, _NSFW)
    else:
        return None
    return list(found) if isinstance(found, list) and len(found) == count else [False] * count


def _with_flags(output: Any, flags: list[Any], cls: Any) -> Any:
    if isinstance(output, tuple):
        index = _index_of_flags(cls)
        assert index is not None
        return (*output[:index], flags, *output[index + 1 :])
    if isinstance(output, Mapping):  # diffusers' outputs, whose keys leave out what is None
        output[_NSFW] = flags  # type: ignore[index]
    else:
        setattr(output, _NSFW, flags)
    return output


def _index_of_flags(cls: Any) -> int | None:
    names = list(getattr(cls, "__dataclass_fields__", {}))
    return names.index(_NSFW) if _NSFW in names else None


def with_rows(output: Any, other: Any, rows: Sequence[int], count: int, cls: Any) -> Any:
    """The output with some images of another one of as many, and with their flags."""
    images, others = images_of(output), images_of(other)
    output = with_images(output, replaced(images, rows, lambda row: others[row]))
    flags, found = flags_of(output, count, cls), flags_of(other, count, cls)
    if flags is None or found is None:
        return output
    for row in rows:
        flags[row] = found[row]
    return _with_flags(output, flags, cls)


def blank(image: Any) -> Any:
    """Black, in the form of `image`: a PIL image, an array or a tensor. TypeError for others."""
    if isinstance(image, torch.Tensor):
        return torch.zeros_like(image)
    if isinstance(image, np.ndarray):
        return np.zeros_like(image)
    if hasattr(image, "mode") and hasattr(image, "size"):
        from PIL import Image

        return Image.new(image.mode, image.size)
    raise TypeError(f"an image of type {type(image).__name__} cannot be blanked")


def replaced(images: Any, rows: Iterable[int], by: Any) -> Any:
    """`images` (a list, an array or a tensor) with `by(row)` in some rows."""
    if isinstance(images, list):
        listed = list(images)
        for row in rows:
            listed[row] = by(row)
        return listed
    copy: Any = images.clone() if isinstance(images, torch.Tensor) else images.copy()
    for row in rows:
        copy[row] = by(row)
    return copy


def blanked(images: Any, rows: Sequence[int], verdicts: Sequence[list[Verdict]]) -> Any:
    """`images` with blanks in some rows.

    verdicts: of each guard that blocks some. Raises GenerationBlocked where it is not plain which
    images these are.
    """
    try:
        if len(images) == len(verdicts[0]):
            return replaced(images, rows, lambda row: blank(images[row]))
    except (TypeError, IndexError, AttributeError):
        pass
    raise GenerationBlocked(verdicts[0])


def check_images(pipe: Any) -> None:
    """Raises LatentsError for a pipeline that returns no images, but frames of a video or others.

    Told by the pipeline outputs that its module names, or the nearest one of its parents' does.
    """
    for cls in type(pipe).__mro__:
        if "__call__" not in vars(cls):
            continue
        fields = [
            set(getattr(value, "__dataclass_fields__", {}))
            for value in _outputs(cls)
            if value.__name__.endswith("PipelineOutput")
        ]
        if not fields:
            continue
        if not any(names & set(IMAGES) for names in fields):
            raise GuardError(
                f"{type(pipe).__name__} returns {', '.join(sorted(set.union(*fields)))} and no "
                "images, which is what a guard judges and blanks: use output_type='latent' and "
                "Scorer, or latentguard.guard.session in a loop of your own"
            )
        return


def _outputs(cls: type) -> set[type]:
    """The output classes that the module of a pipeline's class names."""
    from diffusers.utils.outputs import BaseOutput

    module: Any = sys.modules.get(cls.__module__)
    return {
        value
        for value in ({} if module is None else vars(module)).values()
        if isinstance(value, type) and issubclass(value, BaseOutput) and value is not BaseOutput
    }


def output_class(pipe: Any) -> type | None:
    """The class of a pipeline's output with images, None where its module names no single one."""
    for cls in type(pipe).__mro__:
        found = {
            value
            for value in _outputs(cls)
            if set(IMAGES) & set(getattr(value, "__dataclass_fields__", {}))
        }
        if len(found) == 1:
            return next(iter(found))
    return None


def blanks(count: int, height: int, width: int, output_type: str) -> Any:
    """Black images of a size in pixels, in the form that `output_type` asks for.

    None for a form that is not known.
    """
    if output_type == "pil":
        from PIL import Image

        return [Image.new("RGB", (width, height)) for _ in range(count)]
    if output_type == "np":
        return np.zeros((count, height, width, 3), dtype=np.float32)
    if output_type == "pt":
        return torch.zeros(count, 3, height, width)
    return None
