"""Arrays of a file besides the latents that are read: could they be latents, too?

A user of the file gets every array in it, so an array with the shape of latents that was not looked
at must be an error. Text embeddings often have such a shape. They are recognized by their name and
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from latentguard.errors import LatentsError
from latentguard.spaces import SPACES

# A matrix of fewer rows is a list of features rather than the tokens of one image (16x16 cells).
_MIN_TOKENS = 64
# Parts of the names under which trainers and pipelines keep text embeddings.
TEXT = ("prompt_embed", "hidden_state", "pooled", "text_embed", "encoder_hidden", "input_ids")
_TEXT_PARTS = (*TEXT, "text", "caption", "cond", "emb", "t5", "clip")
# Text encoders are at least this wide; latents of it are pictures of 4,096 pixels or more.
_TEXT_WIDTH = 512
_SHOWN = 3


@dataclass(frozen=True)
class Beside:
    """The arrays of a file that are not read.

    unread: names of those that could be latents. texts: how many could be latents if their names
    did not say text embeddings. left: how many could be latents, and are skipped because the
    operator named the array that counts.
    """

    unread: tuple[str, ...] = ()
    texts: int = 0
    left: int = 0

    @classmethod
    def of(cls, arrays: Iterable[tuple[str, tuple[int, ...]]], said: bool = False) -> Beside:
        """Of the name and shape of each array of floating point numbers.

        said: whether the operator named the array that counts.
        """
        unread: list[str] = []
        texts = 0
        for name, shape in arrays:
            if not is_shape_of_latents(shape) and not _is_moments(name, shape):
                continue
            if _is_mask(name, shape):
                continue
            if _is_text(name, shape):
                texts += 1
            else:
                unread.append(name)
        if said:
            return cls((), texts, len(unread))
        return cls(tuple(unread), texts)

    def check(self) -> None:
        """Raises LatentsError if some array could be latents."""
        if not self.unread:
            return
        shown = ", ".join(name[:30] for name in self.unread[:_SHOWN])
        if len(self.unread) > _SHOWN:
            shown += f" and {len(self.unread) - _SHOWN} more"
        raise LatentsError(
            f"also holds {shown}, which could be latents but was not looked at: save each array of "
            "latents in a file of its own, or name the one that counts (--key)"
        )


def is_shape_of_latents(shape: tuple[int, ...]) -> bool:
    """[..., C, H, W] of a known space, or packed tokens [B, N, C * 4] or [N, C * 4]."""
    if math.prod(shape) == 0 or len(shape) < 2:
        return False
    packed = {space.packed_channels for space in SPACES.values() if space.packs}
    spatial = len(shape) >= 3 and shape[-3] in {s.channels for s in SPACES.values()} | packed
    if len(shape) >= 4 and shape[-3] == 1:  # an axis of frames
        spatial = spatial or shape[-4] in {space.channels for space in SPACES.values()}
    tokens = len(shape) == 3 or (len(shape) == 2 and shape[0] >= _MIN_TOKENS)
    return spatial or (tokens and shape[-1] in packed)


def channels_of(shape: tuple[int, ...]) -> int:
    """Of an array [..., C, H, W], which may have an axis of frames."""
    return shape[-4] if len(shape) >= 4 and shape[-3] == 1 else shape[-3]


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an array is one mask of a picture, [H, W], as sd-scripts keeps it."""
    return len(shape) == 2 and "mask" in name.lower()


def _is_moments(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an array holds means and deviations, of which latents are made."""
    return len(shape) >= 3 and "moments" in name.lower() and math.prod(shape) > 0


def _is_text(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) <= 3 and shape[-1] >= _TEXT_WIDTH and is_text_name(name.lower())


def is_text_name(name: str) -> bool:
    """Whether a name in small letters is one of text embeddings."""
    return "latent" not in name and any(part in name for part in _TEXT_PARTS)
