"""Placeholders: pictures from files that may be anything, in place of images that are blocked."""

from __future__ import annotations

import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from latentguard.errors import PolicyError
from latentguard.regular import problem, read_bounded
from latentguard.yaml_nodes import clip

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 8 << 20
MAX_PIXELS = 4096 * 4096
FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(path: Path) -> bytes:
    """The bytes of a picture that can be decoded.

    Where Pillow is not installed only its first bytes are looked at: there no image is made either.
    Raises PolicyError: what is wrong with it, as what follows its name.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise PolicyError("there is no such file") from error
    except OSError as error:
        raise PolicyError(problem(error)) from error
    if not _is_known(data):
        raise PolicyError("must be a PNG, JPEG or WebP file")
    if find_spec("PIL") is not None:
        decoded(data)
    return data


def _is_known(data: bytes) -> bool:
    png, jpeg = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
    return data.startswith((png, jpeg)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def decoded(data: bytes) -> Image:
    """The picture in a file's bytes: RGB, upright, what is transparent on black.

    Its size is looked at before it is decoded. Raises PolicyError for what is none.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise PolicyError(
                        f"has {width} x {height} pixels, more than {MAX_PIXELS:,} in all"
                    )
                return flat(ImageOps.exif_transpose(picture))
    except PolicyError:
        raise
    except Exception as error:  # of Pillow's readers, which raise many kinds for a broken file
        raise PolicyError(f"cannot be decoded: {clip(str(error), 100)}") from error


def flat(picture: Image) -> Image:
    """A picture as RGB, what is transparent on black."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear).convert(
        "RGB"
    )
