"""What a guarded pipeline returns: blanks in place of the images that are blocked."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from latentguard.errors import LatentGuardError
from latentguard.judge import Verdict


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
    return getattr(output, "images", None)


def with_images(output: Any, images: Any) -> Any:
    """The output with other images."""
    if isinstance(output, tuple):
        return (images, *output[1:])
    output.images = images
    return output


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


def output_class(pipe: Any) -> type | None:
    """The class of a pipeline's output with images, None where its module names no single one."""
    from diffusers.utils.outputs import BaseOutput

    for cls in type(pipe).__mro__:
        module: Any = sys.modules.get(cls.__module__)
        found = (
            {
                value
                for value in vars(module).values()
                if isinstance(value, type)
                and issubclass(value, BaseOutput)
                and "images" in getattr(value, "__dataclass_fields__", {})
            }
            if module is not None
            else set()
        )
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
