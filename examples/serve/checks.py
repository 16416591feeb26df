"""What a request may ask, and what it may cost: bytes to latents that a guard can judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from bodies import Body, BodyError, read_body
from numpy.typing import NDArray

from latentguard.runtime import Guard


@dataclass(frozen=True)
class Limits:
    """What requests may cost. In memory: max_requests x max_bytes, several times over.

    max_bytes: of a body. max_images: of a request, and of a batch. max_cells: height x width of an
    image in latent cells; 16,384 are 1024 x 1024 pixels. max_requests: judged or waiting at a time;
    a further one is answered with 503 at once. read_seconds: for a body to arrive. seconds: from
    its arrival until the verdict.
    """

    max_bytes: int = 16 << 20
    max_images: int = 16
    max_cells: int = 128 * 128
    max_requests: int = 64
    read_seconds: float = 10.0
    seconds: float = 10.0


@dataclass(frozen=True)
class Asked:
    """The query: the convention of the latents, where the file does not carry it, their noise
    level, and for packed tokens their height and width in latent cells."""

    space: str | None = None
    scaled: bool | None = None
    noise_level: float = 0.0
    height: int | None = None
    width: int | None = None


class Refused(Exception):  # noqa: N818 (an answer, not a fault)
    """An answer without verdicts: an HTTP status, and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


def read_latents(data: bytes, asked: Asked, guard: Guard, limits: Limits) -> NDArray[Any]:
    """The latents of a request, [B, C, H, W] or tokens [B, N, C]. Raises Refused."""
    try:
        body = read_body(data)
    except BodyError as error:
        raise Refused(422, str(error)) from error
    _check_convention(body, asked, guard)
    array = body.array
    packed = asked.height is not None and asked.width is not None
    if array.ndim == 3 and not packed:
        array = array[None]
    if array.ndim not in (3, 4):
        raise Refused(422, f"latents must be [B, C, H, W], got shape {list(array.shape)}")
    if len(array) > limits.max_images:
        raise Refused(413, f"{len(array)} images; at most {limits.max_images} a request")
    patch = int(guard.metadata["packed_patch"])
    cells = array.shape[1] * patch**2 if packed else int(np.prod(array.shape[2:]))
    if cells > limits.max_cells:
        raise Refused(413, f"images of {cells} latent cells; at most {limits.max_cells}")
    return array


def _check_convention(body: Body, asked: Asked, guard: Guard) -> None:
    """A latent never travels with a convention that is a guess."""
    for key, right in (("space", guard.space), ("scaled", guard.scaled)):
        told = [said for said in (getattr(body, key), getattr(asked, key)) if said is not None]
        if not told:
            raise Refused(
                422, f"say {key} in the query or in the file; this guard reads {key}={right}"
            )
        for said in told:
            if said != right:
                raise Refused(422, f"this guard reads {key}={right} latents, not {key}={said}")
