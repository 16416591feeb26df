"""What a latents file says about itself, and what follows from it.

A file may declare `space`, `scaled`, `layout`, `height`, `width`, `ids`, and `scale` and `shift`,
which must be those of its space or of the space that the operator gives. The same keys hold in a
.pt dict, in safetensors metadata (as JSON text), in an .npz and in a shard's KEY.json. Other keys
are ignored.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from numpy.typing import NDArray

from latentguard.errors import LatentsError
from latentguard.files.beside import Beside
from latentguard.files.bounds import MAX_ID, MAX_IMAGE_CELLS
from latentguard.spaces import SCALINGS, SPACES, LatentSpace, known_names

Image = NDArray[Any]
"""One image's numbers, an array of its own: float16, float32, float64 or `BFLOAT16`."""

LAYOUTS = ("spatial", "packed", "patches")


def channel_counts() -> set[int]:
    """Of images of the known spaces, as cells or as patches."""
    return {space.channels for space in SPACES.values()} | {
        space.packed_channels for space in SPACES.values() if space.packs
    }


def packed_spaces(width: int) -> list[LatentSpace]:
    """The known spaces whose tokens have so many channels."""
    return [s for s in SPACES.values() if s.packs and s.packed_channels == width]


@dataclass(frozen=True)
class Claims:
    """What is known before a single number is read; None for what is unknown."""

    space: str | None = None
    scaled: bool | None = None
    layout: str | None = None
    height: int | None = None
    width: int | None = None
    ids: tuple[str, ...] | None = None
    scale: float | tuple[float, ...] | None = None
    shift: float | tuple[float, ...] | None = None
    pixel_height: int | None = None
    pixel_width: int | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any], text: bool = False, pixels: bool = False) -> Claims:
        """Validate the known keys of a mapping.

        Args:
            text: whether every value is a string.
            pixels: whether height and width are of pixels, where no layout is said. What says it
                speaks of latents, in their cells.

        Raises:
            LatentsError: a known key with a value that is not what it must be.
        """
        found = {key: values[key] for key in _PARSERS if values.get(key) is not None}
        if text:
            found = {key: _from_text(key, value) for key, value in found.items()}
        parsed = {key: _PARSERS[key](key, value) for key, value in found.items()}
        if pixels and "layout" not in parsed:
            parsed = {f"pixel_{k}" if k in ("height", "width") else k: v for k, v in parsed.items()}
        return cls(**parsed)

    def size(self, space: LatentSpace) -> tuple[int | None, int | None]:
        """Height and width in latent cells of a space, None where nothing says them.

        Raises LatentsError where pixels are no whole number of cells, or deny what is said in them.
        """
        found = []
        pairs = ((self.height, self.pixel_height), (self.width, self.pixel_width))
        for cells, pixels in pairs:
            if pixels is not None:
                count, rest = divmod(pixels, space.vae_scale_factor)
                if rest or cells not in (None, count):
                    raise LatentsError(
                        f"{pixels} pixels are not {cells or 'a whole number of'} latent cells of "
                        f"{space}, of which each has {space.vae_scale_factor}"
                    )
                cells = count
            found.append(cells)
        return found[0], found[1]

    def merged(self, other: Claims, mine: str, theirs: str) -> Claims:
        """Both together. Raises LatentsError if they contradict each other."""
        known = {}
        for one in fields(self):
            here, there = getattr(self, one.name), getattr(other, one.name)
            if here is not None and there is not None and here != there:
                name = one.name.replace("_", " ")  # pixel height
                raise LatentsError(
                    f"{mine} says {name} {_shown(here)}, {theirs} says {_shown(there)}"
                )
            known[one.name] = there if here is None else here
        return Claims(**known)

    def check_scaling(self, space: LatentSpace, scaled: bool) -> None:
        """Refuse a declared scale or shift that is not the space's.

        Latents can say that they are scaled in whatever way, and a wrong one shows another image.
        So a file may repeat the numbers of its space, or those of the space that the operator gave,
        and decides nothing by them.

        space: as the operator gave it, else as the file names it or it was recognized.

        Raises LatentsError, which says what to do.
        """
        if self.scale is None and self.shift is None:
            return
        try:
            declared = replace(
                space,
                scale=space.scale if self.scale is None else self.scale,
                shift=space.shift if self.shift is None else self.shift,
            )
        except LatentsError as error:
            raise LatentsError(f"the file declares something impossible: {error}") from error
        # flux2 has no numbers without its VAE's statistics: scaled means normalized by any.
        settled = space.scale is not None or scaled
        if settled and space.is_scaled_as(declared):
            return
        raise LatentsError(
            f"the file declares a scaling of its own ({_declared(self)}), which is not that of "
            f"{_usual(space)}: give the space that has it (in Python space=, a LatentSpace with "
            f"these numbers; for Playground 2.5 --space {', '.join(SCALINGS)}), or take scale and "
            "shift out of the file"
        )


KEYS = frozenset(("space", "scaled", "layout", "height", "width", "ids", "scale", "shift"))
"""The keys that a file may hold beside its latents."""


@dataclass(frozen=True)
class Payload:
    """One file, or one member of a shard, opened as far as its header.

    `images` yields each image, [C, H, W] or tokens [N, C], or the error that replaces it; it can be
    called again. A LatentsError that it raises ends the file.

    twofold: whether an array's shape is that of one image and of packed tokens (`is_twofold`).
    beside: the arrays that are not read.
    parts: name and number of images of each array, where names tell the images apart.
    """

    claims: Claims
    images: Callable[[], Iterator[Image | LatentsError]]
    twofold: bool = False
    beside: Beside = field(default_factory=Beside)
    parts: tuple[tuple[str, int], ...] = ()

    def names(self, key: str | None = None) -> Iterator[str | None]:
        """One name an image, without end: as the file gives them, or else the `key` of a sample.

        Raises LatentsError for a name over the limit.
        """
        ids = self.claims.ids
        for part, _ in self.parts:
            image_id(part)  # a key of a file is as long as its author likes
        if not self.parts:
            yield from itertools.repeat(key) if ids is None else ids
        whole = ids is not None and all(count == len(ids) for _, count in self.parts)
        for part, count in self.parts:
            for number in range(count):
                if ids is not None and whole:
                    yield f"{ids[number]}/{part}"
                    continue
                name = part if count == 1 else f"{part}/{number}"
                yield name if key is None else f"{key}/{name}"
        yield from itertools.repeat(None)

    def check_names(self, count: int) -> None:
        """LatentsError unless there are as many ids as each array has images, or all have."""
        ids = self.claims.ids
        if ids is None or len(ids) == count:
            return
        if not self.parts or any(part != len(ids) for _, part in self.parts):
            raise LatentsError(f"has {len(ids)} ids for {count} images")


@dataclass(frozen=True)
class Plan:
    """How one array holds images: `count` of them of `shape`, one after the other.

    frames: the array's axis of frames, of which there is one, and which `shape` leaves out.
    moments: whether means are followed by deviations, which `shape` leaves out.
    """

    count: int
    shape: tuple[int, ...]
    layout: str
    frames: int | None = None
    moments: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of an image's numbers in the file; its first `shape[0]` channels count."""
        return (self.shape[0] * 2, *self.shape[1:]) if self.moments else self.shape


def plan(shape: tuple[int, ...], claims: Claims, moments: bool = False) -> Plan:
    """Read an array's shape as a batch of images, or as one.

    moments: whether its channels are those of means, and then as many of deviations.

    Raises:
        LatentsError: a rank, size or layout that is no batch of latents.
    """
    if math.prod(shape) == 0:
        raise LatentsError(f"the latents are empty (shape {list(shape)})")
    if moments:
        whole = plan(_means(shape), claims)
        if whole.layout == "packed":
            raise LatentsError(f"moments must be [B, 2 * C, H, W], got tokens {list(shape)}")
        return replace(whole, moments=True)
    layout = _layout(shape, claims)
    rank = 2 if layout == "packed" else 3
    frames = _frames(shape, claims) if layout != "packed" else None
    if frames is not None:
        shape = (*shape[:frames], *shape[frames + 1 :])
    if len(shape) not in (rank, rank + 1):
        expected = "[B, N, C] or [N, C]" if layout == "packed" else "[B, C, H, W] or [C, H, W]"
        raise LatentsError(f"{layout} latents must be {expected}, got shape {list(shape)}")
    count, image = (shape[0], shape[1:]) if len(shape) == rank + 1 else (1, shape)
    cells = image[0] * 4 if layout == "packed" else image[1] * image[2]
    channels = image[1] if layout == "packed" else image[0]
    if cells > MAX_IMAGE_CELLS:
        raise LatentsError(
            f"an image of {cells} latent cells (shape {list(shape)}) is over the limit of "
            f"{MAX_IMAGE_CELLS}"
        )
    if channels > max(channel_counts()):
        raise LatentsError(
            f"latents of {channels} channels (shape {list(shape)}) are of no known space "
            f"({', '.join(f'{s.name} {s.channels}' for s in SPACES.values())})"
        )
    return Plan(count, image, layout, frames)


def _means(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the means of an array of means and deviations."""
    axis = 0 if len(shape) == 3 else 1
    if len(shape) == 4 and shape[1] == 1:
        axis = 0  # [2 * C, 1, H, W], of one frame
    if len(shape) not in (3, 4, 5) or shape[axis] % 2:
        raise LatentsError(
            f"moments must be [B, 2 * C, H, W] or [2 * C, H, W], got shape {list(shape)}"
        )
    return (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])


def _frames(shape: tuple[int, ...], claims: Claims) -> int | None:
    """The axis of frames of [B, C, 1, H, W] and [C, 1, H, W].

    Raises LatentsError for latents of a video, of which no frame is an image of its own.
    """
    video = "latents of a video are not images ({} frames, got shape {}): only one can be judged"
    if len(shape) == 5:
        if shape[2] != 1:
            raise LatentsError(video.format(shape[2], list(shape)))
        return 2
    if len(shape) != 4:
        return None
    space = None if claims.space is None else SPACES[claims.space]
    if space is not None and space.temporal_factor > 1 and shape[0] == space.channels:
        counts = {space.channels, space.packed_channels}
        if shape[1] not in {1, *counts}:
            raise LatentsError(video.format(shape[1], list(shape)))
    counts = channel_counts() if space is None else {space.channels}
    return 1 if shape[1] == 1 and shape[0] in counts else None


def is_twofold(shape: tuple[int, ...]) -> bool:
    """Whether an array can be one image [C, H, W], of cells or of patches, and packed tokens
    [B, N, C * 4] of one space."""
    if len(shape) != 3:
        return False
    return any(shape[0] in (s.channels, s.packed_channels) for s in packed_spaces(shape[2]))


def _layout(shape: tuple[int, ...], claims: Claims) -> str:
    """The declared layout, else what the shape can only be."""
    if claims.layout is not None:
        return claims.layout
    if len(shape) in (4, 5):
        return "spatial"
    if len(shape) != 3:
        raise LatentsError(
            f"latents must be [B, C, H, W], [C, H, W] or packed [B, N, C], got shape {list(shape)}"
        )
    size = (claims.height, claims.width)
    # [C, H, W] and packed [B, N, C] have the same rank: the declared size, else the channel count.
    packed = any(
        claims.space in (None, space.name)
        and shape[1] * space.packed_patch**2 == _cells_said(claims, space)
        for space in packed_spaces(shape[2])
    )
    channels = {s.channels for s in SPACES.values() if claims.space in (None, s.name)}
    spatial = shape[0] in channels and size in ((None, None), shape[1:])
    if packed and claims.pixel_height is not None:
        # Pixels that fit the tokens, and are not those of cells.
        spatial = spatial and any(
            claims.space in (None, s.name) and _cells_said(claims, s) == shape[1] * shape[2]
            for s in SPACES.values()
            if s.channels == shape[0]
        )
    if not packed and not spatial:
        spatial = _is_patches(shape, claims)
    if packed is not spatial:
        return "packed" if packed else "spatial"
    raise LatentsError(
        f"shape {list(shape)} could be one image [C, H, W] or packed tokens [B, N, C]: declare "
        "layout (spatial or packed; in the file, or by --layout), and for packed ones height and "
        f"width in latent cells{if_pixels(claims)}{if_moments(shape[0], channels)}"
    )


def if_pixels(claims: Claims) -> str:
    """What to do about a size that does not fit, as the end of a sentence."""
    if claims.height is None and claims.width is None:
        return ""
    return "; if the given height and width are in pixels, say --pixels"


def if_moments(count: int, channels: set[int]) -> str:
    """What to do about an array of so many channels, as the end of a sentence."""
    if count % 2 or count in channels or count // 2 not in channels:
        return ""
    return f"; if its {count} channels are means and deviations, say --moments"


def _cells_said(claims: Claims, space: LatentSpace) -> int:
    """How many latent cells an image is said to have, -1 where nothing says it."""
    try:
        height, width = claims.size(space)
    except LatentsError:
        return -1
    return -1 if height is None or width is None else height * width


def _is_patches(shape: tuple[int, ...], claims: Claims) -> bool:
    """Whether [C, H, W] is one image whose cells are gathered to patches."""
    return any(
        shape[0] == space.packed_channels
        and shape[2] != space.packed_channels
        and claims.space in (None, space.name)
        and (claims.height, claims.width)
        in ((None, None), (shape[1] * space.packed_patch, shape[2] * space.packed_patch))
        for space in SPACES.values()
        if space.packed_patch > 1
    )


# -- values ----------------------------------------------------------------------------------


def _from_text(key: str, value: str) -> Any:
    """Metadata of a safetensors file: names as they are, everything else as JSON."""
    if key in ("space", "layout"):
        return value
    try:
        # Accepts True as Python writes it, too.
        return json.loads(value.lower() if key == "scaled" else value)
    except (ValueError, RecursionError) as error:
        raise LatentsError(f"metadata {key} must be JSON, got {_shown(value)}") from error


def _space(key: str, value: Any) -> str:
    if not isinstance(value, str) or value in SCALINGS or value not in known_names():
        raise LatentsError(f"{key} must be one of {', '.join(SPACES)}, got {_shown(value)}")
    return LatentSpace.get(value).name


def _scaled(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise LatentsError(f"{key} must be true or false, got {_shown(value)}")
    return value


def _layout_name(key: str, value: Any) -> str:
    if value not in LAYOUTS:
        raise LatentsError(f"{key} must be {' or '.join(LAYOUTS)}, got {_shown(value)}")
    return str(value)


def _cells(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_IMAGE_CELLS:
        raise LatentsError(f"{key} must be a number of latent cells, got {_shown(value)}")
    return value


def _ids(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise LatentsError(f"{key} must be a list of names, got {_shown(value)}")
    return tuple(image_id(item) for item in value)


def image_id(value: Any) -> str:
    """One image's name: a string, or a whole number as its digits."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise LatentsError(f"an id must be a string or a whole number, got {_shown(value)}")
    name = str(value)
    if len(name) > MAX_ID:
        raise LatentsError(f"an id has {len(name)} characters, over the limit of {MAX_ID}")
    return name


def _factors(key: str, value: Any) -> float | tuple[float, ...]:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    good = numbers and all(
        isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers
    )
    if not good or len(numbers) > max(channel_counts()) or not all(abs(n) < 1e30 for n in numbers):
        raise LatentsError(f"{key} must be a finite number or one per channel, got {_shown(value)}")
    if isinstance(value, (list, tuple)):
        return tuple(float(number) for number in value)
    return float(value)


_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "space": _space,
    "scaled": _scaled,
    "layout": _layout_name,
    "height": _cells,
    "width": _cells,
    "ids": _ids,
    "scale": _factors,
    "shift": _factors,
}


def _shown(value: Any) -> str:
    """A value in an error message: short, and on one line."""
    text = repr(value) if isinstance(value, (str, int, float, bool)) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _declared(claims: Claims) -> str:
    pairs = (("scale", claims.scale), ("shift", claims.shift))
    return ", ".join(f"{key} {_factors_shown(value)}" for key, value in pairs if value is not None)


def _usual(space: LatentSpace) -> str:
    if space.scale is None or space.shift is None:
        return f"{space}, whose statistics only its VAE has"
    return f"{space} (scale {_factors_shown(space.scale)}, shift {_factors_shown(space.shift)})"


def _factors_shown(value: float | tuple[float, ...]) -> str:
    numbers = value if isinstance(value, tuple) else (value,)
    shown = ", ".join(f"{number:.6g}" for number in numbers[:4])
    return shown if len(numbers) <= 4 else f"{shown}, ..."
