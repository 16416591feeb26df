"""What a request may ask, and what it may cost: bytes to latents that a guard can judge."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentguard.files.claims import Claims, Payload
from latentguard.files.numpy_files import open_npy
from latentguard.files.safetensors_files import open_safetensors
from latentguard.files.torch_files import open_torch
from latentguard.runtime import Guard, LatentsError
from latentguard.spaces.arrays import widened

_ZIP = b"PK\x03\x04"
# What people send by mistake, by how it begins.
_OTHERS = {
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    _ZIP: "a zip archive, as .pt and .npz files are",
}


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


class Refused(Exception):  # noqa: N818 (an answer, not a fault)
    """An answer without verdicts: an HTTP status, and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class Given(NamedTuple):
    """The latents of a request, [B, C, H, W] or tokens [B, N, C], and their height and width in
    latent cells, which tokens need."""

    latents: NDArray[Any]
    height: int | None
    width: int | None


def check_form(headers: Mapping[str, str]) -> None:
    """Raise Refused for a body that is not the file itself, before it is read."""
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise Refused(
            415,
            f"the body has Content-Encoding {encoding[:40]!r}, which is not read here: send the "
            "bytes of the .npy or .safetensors file as they are",
        )
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        raise Refused(
            415,
            f"the body is a form ({kind[:40]}): send the .npy or .safetensors file alone, with "
            "curl --data-binary @FILE in place of -F",
        )


def read_latents(
    data: bytes,
    asked: Mapping[str, Any],
    guard: Guard,
    limits: Limits,
    *,
    what: str = "the body",
    torch_files: bool = False,
) -> Given:
    """The latents in a .npy or .safetensors file, told apart by how they begin.

    asked: what the query says of them: space, scaled, layout, height, width; None or missing where
    it says nothing. What neither says, or the two say differently, is refused, not guessed.
    what: what the data are, in messages. torch_files: read .pt files, too.

    Raises Refused. Nothing is unpickled, and no size is believed; see `latentguard.files`.
    """
    for begins, kind in _OTHERS.items():
        if data.startswith(begins) and not (torch_files and begins == _ZIP):
            raise Refused(
                422,
                f"{what} is {kind}: send the bytes of a .npy or .safetensors file as they are",
            )
    stream = io.BytesIO(data)
    try:
        claims = Claims.parse(asked)
        payload = _opener(data)(stream, len(data), claims)
        payload.beside.check()
        _check_convention(payload.claims, guard)
        images = []
        for image in itertools.islice(payload.images(), limits.max_images + 1):
            if isinstance(image, LatentsError):
                raise image
            images.append(widened(image))
    except LatentsError as error:
        raise Refused(422, f"{what} cannot be read: {error}") from error
    if len(images) > limits.max_images:
        raise Refused(413, f"more than {limits.max_images} images in a request")
    latents = np.stack(images)
    packed = latents.ndim == 3
    patch = int(guard.metadata["packed_patch"])
    cells = latents.shape[1] * patch**2 if packed else int(np.prod(latents.shape[2:]))
    if cells > limits.max_cells:
        raise Refused(413, f"images of {cells} latent cells; at most {limits.max_cells}")
    found = payload.claims
    return Given(latents, found.height, found.width)


def _opener(data: bytes) -> Callable[[BinaryIO, int, Claims], Payload]:
    if data.startswith(b"\x93NUMPY"):
        return open_npy
    return open_torch if data.startswith(_ZIP) else open_safetensors


def _check_convention(claims: Claims, guard: Guard) -> None:
    """A latent never travels with a convention that is a guess."""
    for key, right in (("space", guard.space), ("scaled", guard.scaled)):
        said = getattr(claims, key)
        if said is None:
            raise Refused(
                422, f"say {key} in the query or in the file; this guard reads {key}={right}"
            )
        if said != right:
            raise Refused(422, f"this guard reads {key}={right} latents, not {key}={said}")
    if claims.scale is not None or claims.shift is not None:
        raise Refused(422, "latents with a scale or shift of their own are not read here")
