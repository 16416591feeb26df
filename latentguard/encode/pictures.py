"""From a picture's bytes to RGB: few formats, bounded, upright, and the same on every machine.

Pictures that are not plain RGB are converted. They are rotated as their EXIF orientation says.
Transparency is laid on white. Gray, palette and CMYK pictures become RGB by Pillow's formulas, and
color profiles are not applied. 16 bits become 8. An animation is read as its first frame.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from latentguard import regular
from latentguard.errors import LatentsError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

MAX_BYTES = 256 * 2**20
"""Of a picture's file."""
MAX_PIXELS = 128 * 2**20
"""Of a picture as it is stored, told by its header: cameras have up to 100 million. In RGB with
transparency that is half a gigabyte."""


def read_picture(path: Path) -> bytes:
    """A picture file's bytes. Raises LatentsError: not regular, not there, or over `MAX_BYTES`."""
    try:
        return regular.read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise LatentsError(regular.problem(error, "opened")) from error


def check_bytes(size: int) -> None:
    """LatentsError for a picture of more bytes than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise LatentsError(f"is a picture of over {MAX_BYTES} bytes, which is the limit")


def decode_picture(data: bytes) -> Image.Image:
    """The picture as RGB, upright.

    Raises LatentsError, one sentence without a name: no picture of a known format, damaged or
    truncated, or over `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow's own limit is below ours, and a warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
                _check_size(*opened.size)
                opened.load()
                return _rgb(ImageOps.exif_transpose(opened))
    except LatentsError:
        raise
    except Image.DecompressionBombError as error:
        raise LatentsError(f"has more pixels than the limit of {MAX_PIXELS}") from error
    except UnidentifiedImageError as error:
        raise LatentsError(f"is not a picture in a known format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = str(error).split("\n", 1)[0][:200]
        raise LatentsError(f"is a damaged picture ({type(error).__name__}: {reason})") from error


def open_picture(path: Path) -> Image.Image:
    """A file's picture as RGB, upright. Raises LatentsError, which names the file."""
    try:
        return decode_picture(read_picture(path))
    except LatentsError as error:
        raise LatentsError(f"{path}: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise LatentsError(f"has {width} x {height} pixels, over the limit of {MAX_PIXELS} in all")


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits of gray. Pillow would cut off all above 255.
        return image.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        white = Image.new("RGBA", above.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, above).convert("RGB")
    return image.convert("RGB")
