"""Freely licensed artwork from package registries, drawn over pictures.

Emoji are SVG from npm packages (pinned below, fetched by `npm pack`), rasterized by CairoSVG;
bottles and glasses that no emoji set draws well are turned on a lathe here. `examples/README.md`
names every license.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 256

# set -> (npm package, version); the license of the artwork is in README.md
PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7"),
}


class Artwork:
    """The emoji sets, kept in a folder.

    folder: where packages lie or are fetched to; needs npm the first time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sets: dict[str, dict] = {}

    def emoji(self, name: str, size: int) -> Image.Image:
        """An emoji such as "noto/wine-glass", RGBA, its longer side `size` pixels."""
        import cairosvg

        chosen, icon = name.split("/")
        icons = self._icons(chosen)
        icon = icons.get("aliases", {}).get(icon, {}).get("parent", icon)
        if icon not in icons["icons"]:
            raise KeyError(f"{PACKAGES[chosen][0]} has no icon {icon}")
        found = icons["icons"][icon]
        width = found.get("width", icons.get("width", 16))
        height = found.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{found["body"]}</svg>'
        )
        png = cairosvg.svg2png(svg.encode(), output_width=2 * size, output_height=2 * size)
        return fit(Image.open(io.BytesIO(png)).convert("RGBA"), size)

    def _icons(self, chosen: str) -> dict:
        if chosen not in self._sets:
            package, version = PACKAGES[chosen]
            unpacked = self.folder / f"{chosen}-{version}"
            if not unpacked.is_dir():
                _fetch(package, version, unpacked)
            self._sets[chosen] = json.loads((unpacked / "package" / "icons.json").read_text())
        return self._sets[chosen]


def _fetch(package: str, version: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        [
            "npm",
            "pack",
            "--silent",
            "--pack-destination",
            str(target.parent),
            f"{package}@{version}",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    archive = target.parent / packed.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    archive.unlink()


def fit(picture: Image.Image, size: int) -> Image.Image:
    """Crop to what is drawn, longer side `size`."""
    picture = picture.crop(picture.getbbox())
    factor = size / max(picture.size)
    width, height = (max(1, round(n * factor)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def paste(
    background: Image.Image,
    picture: Image.Image,
    center: tuple[float, float] = (0.5, 0.5),
    turn: float = 0,
) -> Image.Image:
    """Draw an RGBA picture over a background; `center` in 0..1, `turn` in degrees to the left."""
    result = background.copy()
    size = max(picture.size)
    if turn:
        picture = fit(picture.rotate(turn, Image.Resampling.BICUBIC, expand=True), size)
    x, y = (round(c * b - p / 2) for c, b, p in zip(center, result.size, picture.size, strict=True))
    result.paste(picture, (x, y), picture)
    return result


def square(
    picture: Image.Image, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """RGB, 256 x 256: the center square, or a box (left, top, right, bottom) in 0..1."""
    picture = picture.convert("RGB")
    width, height = picture.size
    if box is None:
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        crop = (left, top, left + side, top + side)
    else:
        crop = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=crop)


def gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    """A plain background that changes from top to bottom."""
    t = np.linspace(0, 1, SIDE)[:, None, None]
    rows = (1 - t) * np.array(top) + t * np.array(bottom)
    return Image.fromarray(np.broadcast_to(rows, (SIDE, SIDE, 3)).round().astype(np.uint8))


BACKGROUNDS = {
    "white": gradient((255, 255, 255), (255, 255, 255)),
    "gray": gradient((235, 235, 235), (150, 150, 150)),
    "brown": gradient((190, 150, 110), (130, 90, 50)),
    "dark": gradient((70, 70, 74), (40, 40, 44)),
    "blue": gradient((200, 225, 245), (120, 160, 200)),
}

# Half width of a turned body at heights from 0 (top) to 1 (bottom), and the parts drawn on it:
# (from, to, color). Widths are relative to the height.
Profile = tuple[tuple[float, float], ...]
Parts = tuple[tuple[float, float, tuple[int, int, int]], ...]
BODIES: dict[str, tuple[Profile, Parts]] = {
    "beer-bottle": (
        ((0, 0.055), (0.04, 0.058), (0.05, 0.048), (0.3, 0.056), (0.42, 0.12), (0.48, 0.135),
         (0.98, 0.135), (1, 0.12)),
        ((0, 1, (92, 44, 12)), (0, 0.045, (205, 165, 60)), (0.16, 0.26, (225, 205, 150)),
         (0.55, 0.84, (232, 214, 160)), (0.6, 0.79, (150, 30, 25)), (0.66, 0.73, (240, 225, 180))),
    ),
    "wine-bottle": (
        ((0, 0.05), (0.04, 0.05), (0.05, 0.045), (0.32, 0.048), (0.42, 0.12), (0.46, 0.135),
         (0.98, 0.135), (1, 0.12)),
        ((0, 1, (22, 46, 24)), (0, 0.2, (110, 16, 28)), (0.55, 0.86, (238, 232, 214)),
         (0.6, 0.63, (120, 20, 30)), (0.68, 0.69, (60, 60, 60)), (0.72, 0.73, (60, 60, 60)),
         (0.76, 0.77, (60, 60, 60))),
    ),
    "beer-glass": (
        ((0, 0.27), (0.3, 0.26), (0.7, 0.22), (0.96, 0.19), (1, 0.18)),
        ((0, 1, (222, 148, 26)), (0.03, 0.2, (252, 246, 226)), (0, 0.03, (225, 230, 235)),
         (0.94, 1, (215, 220, 225))),
    ),
}  # fmt: skip


@lru_cache(maxsize=16)
def lathe(body: str, height: int) -> Image.Image:
    """A turned body of glass under two lights, RGBA, `height` pixels high."""
    profile, parts = BODIES[body]
    scale = 4  # drawn larger, then averaged
    tall = height * scale
    y = (np.arange(tall) + 0.5) / tall
    knots = np.array(profile)
    radius = np.interp(y, knots[:, 0], knots[:, 1])
    radius = np.convolve(np.pad(radius, 12 * scale, mode="edge"), np.ones(25) / 25, "same")[
        12 * scale : -12 * scale
    ]
    wide = int(np.ceil(2.1 * knots[:, 1].max() * tall))
    x = (np.arange(wide) + 0.5 - wide / 2) / tall
    u = x[None] / radius[:, None]
    inside = np.abs(u) <= 1
    u = np.clip(u, -1, 1)
    facing = np.sqrt(1 - u**2)
    slope = np.gradient(radius, 1 / tall)[:, None]
    color = np.zeros((tall, wide, 3))
    for start, end, rgb in parts:
        color[(y >= start) & (y < end)] = rgb
    light = 0.35 + 0.65 * np.clip(-0.5 * u + 0.8 * facing - 0.15 * slope, 0, 1)
    shine = 45.9 * np.exp(-(((u + 0.55) / 0.07) ** 2)) + 21.42 * np.exp(-(((u - 0.72) / 0.05) ** 2))
    shine = shine * ((y > 0.06) & (y < 0.97))[:, None]
    rgb = color * light[..., None] + shine[..., None]
    rgba = np.dstack([np.clip(rgb, 0, 255), 255 * inside]).astype(np.uint8)
    picture = Image.fromarray(rgba, "RGBA").resize(
        (wide // scale, height), Image.Resampling.LANCZOS
    )
    return picture.crop(picture.getbbox())
