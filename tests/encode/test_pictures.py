"""A picture's bytes to RGB: what comes out, and what is refused."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from encode_helpers import encoded, photo, photo_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentguard.encode import pictures
from latentguard.encode.pictures import decode_picture, open_picture, read_picture
from latentguard.errors import LatentsError


def pixel(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    found = image.getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG", "WEBP"])
def test_formats(kind: str) -> None:
    image = decode_picture(encoded(photo(), kind))
    assert (image.mode, image.size) == ("RGB", (64, 48))
    if kind in ("PNG", "BMP"):
        assert (np.asarray(image) == np.asarray(photo())).all()


def test_orientation_is_followed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = decode_picture(encoded(photo(), "PNG", exif=exif))
    assert image.size == (48, 64)
    assert (np.asarray(image) == np.rot90(np.asarray(photo()), -1)).all()


def test_what_is_not_plain_rgb() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert pixel(decode_picture(encoded(half))) == (255, 255, 255)  # transparent is white
    assert pixel(decode_picture(encoded(Image.new("LA", (2, 2), (0, 0))))) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 255] * 256)
    assert pixel(decode_picture(encoded(palette))) == (0, 0, 255)
    assert pixel(decode_picture(encoded(palette, transparency=0))) == (255, 255, 255)
    assert pixel(decode_picture(encoded(Image.new("RGB", (2, 2), 7), transparency=(7, 0, 0)))) == (
        255, 255, 255,
    )  # fmt: skip
    assert pixel(decode_picture(encoded(Image.new("L", (2, 2), 9)))) == (9, 9, 9)
    assert pixel(decode_picture(encoded(Image.new("1", (2, 2), 1)))) == (255, 255, 255)
    cmyk = decode_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert pixel(cmyk)[0] > 250
    assert max(pixel(cmyk)[1:]) < 5


def test_sixteen_bits_become_eight() -> None:
    gray = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert np.asarray(decode_picture(encoded(gray)))[0, :, 0].tolist() == [0, 127, 255]


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(decode_picture(data)) == (255, 0, 0)


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that announces many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 20_000, 2**31 - 1])
def test_a_picture_of_too_many_pixels(side: int) -> None:
    with pytest.raises(LatentsError, match="limit of 134217728"):
        decode_picture(bomb(side, side))


def test_a_file_of_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 1 << 20)
    path = tmp_path / "a.png"
    path.write_bytes(photo_bytes() + bytes(1 << 20))
    with pytest.raises(LatentsError, match="larger than 1 MiB"):
        read_picture(path)


def test_damaged_pictures(tmp_path: Path) -> None:
    data = photo_bytes(kind="JPEG")
    with pytest.raises(LatentsError, match="damaged picture"):
        decode_picture(data[: len(data) // 2])
    with pytest.raises(LatentsError, match="not a picture in a known format"):
        decode_picture(b"GIF but not really")
    # A format of Pillow's that nobody asked for.
    with pytest.raises(LatentsError, match="not a picture in a known format"):
        decode_picture(encoded(photo(), "TIFF"))
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(LatentsError, match=r"a\.png: is not a picture"):
        open_picture(path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(LatentsError, match="not a regular file"):
        read_picture(tmp_path / "pipe.png")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "GIF", "JPEG", "WEBP", "BMP"]),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_changed_bytes_are_a_picture_or_an_error(kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(photo_bytes(kind=kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        found = decode_picture(bytes(data)).mode
    except LatentsError as error:
        found = "RGB" if "\n" not in str(error) else str(error)
    assert found == "RGB"
