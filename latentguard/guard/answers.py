"""What a blocked image becomes: what a policy's `on_block` puts in the place of its blank."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentguard.errors import GuardError, PolicyError
from latentguard.guard.blur import Grid, enlarged, painted, size_of
from latentguard.guard.record import CallRecord, Outcome
from latentguard.judge import Verdict
from latentguard.policy import Policy
from latentguard.policy.picture import decoded, flat, read_picture
from latentguard.yaml_nodes import show

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 2048
"""Pixels along the longer side of a placeholder as it is kept."""


@dataclass(frozen=True)
class Blocked:
    """What `LatentGuard(on_block=function)` gets to know of a blocked image.

    index: of the image in the call. verdict: that which blocked it. blank: black, in the form that
    the pipeline returns. preview: what `on_block: blur` would give, in the same form; None where
    nothing was seen, or the space has no view. prompt: None where the call had none, or embeddings.
    seed: of its generator (`initial_seed`), None where the call had none. record: what was said of
    the call so far.
    """

    index: int
    verdict: Verdict
    blank: Any
    preview: Any
    prompt: str | None
    seed: int | None
    record: CallRecord


class Answers:
    """What one guard gives in the place of blocked images.

    function: for `on_block: callback`. placeholder: an image or a file for `on_block: placeholder`.
    Raises PolicyError where these and the policy do not go together.
    """

    def __init__(
        self,
        policy: Policy,
        function: Callable[..., Any] | None,
        placeholder: Image | str | Path | None,
    ) -> None:
        self.word = policy.answer
        self.retries = policy.retries
        if (self.word == "callback") != (function is not None):
            raise PolicyError(
                f"policy '{policy.name}' says on_block: {policy.on_block}, and LatentGuard was "
                f"given {'no' if function is None else 'an'} on_block function: the two go together"
            )
        self._function = function
        self._takes_one = function is not None and _takes_one(function)
        self._placeholder = _placeholder(policy, placeholder)

    @property
    def previews(self) -> bool:
        """Whether it asks for previews of what is blocked."""
        return self.word == "blur" or self._takes_one

    def instead(self, blocked: Blocked) -> tuple[Any, Outcome] | None:
        """What takes the place of a blank, and how that is told; None for the blank itself.

        Raises GuardError where the function returns nothing.
        """
        if self._function is not None:
            given = (blocked,) if self._takes_one else _three(blocked)
            answer = self._function(*given)
            if answer is None:
                raise GuardError(
                    f"the on_block function returned None for image {blocked.index}: it must "
                    "return what takes the image's place, such as blocked.blank"
                )
            return answer, Outcome("callback")
        if self._placeholder is None:
            return None
        picture = fitted(self._placeholder, blocked.blank)
        if picture is None:
            return blocked.blank, Outcome("blanked", note="its output has another form")
        return picture, Outcome("placeholder")


def _three(blocked: Blocked) -> tuple[int, Verdict, Any]:
    return blocked.index, blocked.verdict, blocked.blank


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether a function takes a Blocked alone, and not its index, verdict and blank image."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of functions that are not Python's own
        return False
    if _binds(signature, 3):
        return False
    if _binds(signature, 1):
        return True
    raise PolicyError(
        "the on_block function must take one argument (latentguard.guard.Blocked) or three (index, "
        f"verdict, blank image), got {signature}"
    )


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _placeholder(policy: Policy, given: Image | str | Path | None) -> Image | None:
    """The picture that a policy's guard shows, None where it says something else."""
    if policy.answer != "placeholder":
        if given is not None:
            raise PolicyError(
                f"policy '{policy.name}' says on_block: {policy.on_block}, and LatentGuard was "
                "given a placeholder: write on_block: placeholder, or leave it out"
            )
        return None
    if policy.on_block != "placeholder" and given is not None:
        raise PolicyError(
            f"policy '{policy.name}' says on_block: {policy.on_block}, and LatentGuard was given "
            "another placeholder: write on_block: placeholder, or leave it out"
        )
    picture = _picture(given) if given is not None else policy.picture
    if picture is None:
        raise PolicyError(
            f"policy '{policy.name}' says on_block: {policy.on_block}, and no picture was read "
            "with it: load the policy from its file and name one there ({placeholder: FILE}), or "
            "give LatentGuard(placeholder=...)"
        )
    found = decoded(picture) if isinstance(picture, bytes) else flat(picture)
    found.thumbnail((LARGEST, LARGEST))
    return found


def _picture(given: Image | str | Path) -> Image | bytes:
    from PIL import Image

    if isinstance(given, str | Path):
        try:
            return read_picture(Path(given))
        except PolicyError as error:
            raise PolicyError(f"placeholder {show(str(given))}: {error}") from error
    if not isinstance(given, Image.Image):
        raise PolicyError(
            f"placeholder must be a PIL image or the path of one, got {type(given).__name__}"
        )
    return given


def fitted(picture: Image, like: Any) -> Any:
    """A picture in the size and form of an image, on black where its sides are others.

    None for an image whose form is not known.
    """
    from PIL import ImageOps

    size = size_of(like)
    if size is None:
        return None
    return painted(np.asarray(ImageOps.pad(picture, size[::-1], color=(0, 0, 0))), like)


def blurred(grid: Grid | None, like: Any) -> Any:
    """The blur of a blocked image in its size and form; None where there is no such."""
    size = size_of(like)
    return None if grid is None or size is None else painted(enlarged(grid, *size), like)
