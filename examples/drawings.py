"""Drawings for examples/teach.py: cigarette-like things, and things that are not.

No autoencoder is needed to make latents of them. A latent space's published linear view turns
latents into small pictures, and here it is turned around. Such latents are a stand-in: nano-sdxl
reads them as it reads a picture, and the latents of a real SDXL picture hold more than that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from latentguard.spaces import Latents, LatentSpace

SIDE, FINE = 64, 4
"""Pixels of a drawing, which are latent cells, and how many times finer it is drawn."""

Color = tuple[int, int, int]
Draw = Callable[[ImageDraw.ImageDraw, random.Random], None]


def _near(color: Color, dice: random.Random, by: int = 25) -> Color:
    r, g, b = (min(255, max(0, value + dice.randint(-by, by))) for value in color)
    return r, g, b


def _background(dice: random.Random) -> Image.Image:
    """Two soft colors and a few blurred patches."""
    size = (SIDE * FINE, SIDE * FINE)
    picture = Image.new("RGB", size, _near((130, 130, 130), dice, 100))
    pen = ImageDraw.Draw(picture)
    for _ in range(dice.randint(2, 6)):
        x, y = dice.randint(-40, size[0]), dice.randint(-40, size[1])
        w, h = dice.randint(40, 200), dice.randint(40, 200)
        pen.ellipse((x, y, x + w, y + h), fill=_near((130, 130, 130), dice, 110))
    return picture.filter(ImageFilter.GaussianBlur(dice.uniform(4, 16)))


def _rod(
    pen: ImageDraw.ImageDraw,
    dice: random.Random,
    parts: Sequence[tuple[float, Color]],
    length: tuple[float, float],
    width: tuple[float, float],
) -> None:
    """A straight thing of colored parts, (share of its length, color), at any angle."""
    full = SIDE * FINE
    long, wide = full * dice.uniform(*length), full * dice.uniform(*width)
    angle = dice.uniform(0, 2 * math.pi)
    x, y = full * dice.uniform(0.35, 0.65), full * dice.uniform(0.35, 0.65)
    along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    begin = -0.5
    for share, color in parts:
        end = begin + share
        corners = [
            (
                x + long * at * along[0] + wide * side * across[0],
                y + long * at * along[1] + wide * side * across[1],
            )
            for at, side in ((begin, -0.5), (end, -0.5), (end, 0.5), (begin, 0.5))
        ]
        pen.polygon(corners, fill=_near(color, dice))
        begin = end


def cigarette(pen: ImageDraw.ImageDraw, dice: random.Random) -> None:
    """White paper, an orange filter, ash and a glowing end."""
    glow = [(0.08, (90, 90, 90)), (0.05, (255, 90, 20))] if dice.random() < 0.8 else []
    paper = 1 - 0.27 - sum(share for share, _ in glow)
    parts = [(0.27, (205, 140, 70)), (paper, (240, 238, 232)), *glow]
    _rod(pen, dice, parts, (0.5, 0.85), (0.05, 0.09))


def pencil(pen: ImageDraw.ImageDraw, dice: random.Random) -> None:
    """A colored body, a light tip with a dark point, a pink end."""
    body = dice.choice([(240, 190, 30), (200, 40, 40), (40, 120, 60), (50, 80, 180)])
    parts: list[tuple[float, Color]] = [
        (0.07, (235, 150, 150)),
        (0.78, body),
        (0.1, (225, 190, 140)),
        (0.05, (40, 40, 40)),
    ]
    _rod(pen, dice, parts, (0.5, 0.9), (0.05, 0.1))


def bar(pen: ImageDraw.ImageDraw, dice: random.Random) -> None:
    """A straw, a stick or a ruler: one color from end to end."""
    _rod(pen, dice, [(1.0, _near((130, 130, 130), dice, 120))], (0.5, 0.95), (0.03, 0.14))


def ball(pen: ImageDraw.ImageDraw, dice: random.Random) -> None:
    """One or two round things."""
    for _ in range(dice.randint(1, 2)):
        side = SIDE * FINE * dice.uniform(0.2, 0.5)
        x, y = (SIDE * FINE * dice.uniform(0.1, 0.5) for _ in range(2))
        pen.ellipse((x, y, x + side, y + side), fill=_near((130, 130, 130), dice, 120))


def box(pen: ImageDraw.ImageDraw, dice: random.Random) -> None:
    """A box of two colors, turned."""
    color = _near((130, 130, 130), dice, 120)
    _rod(pen, dice, [(0.6, color), (0.4, _near(color, dice, 60))], (0.3, 0.5), (0.3, 0.5))


def nothing(pen: ImageDraw.ImageDraw, dice: random.Random) -> None:
    """The background alone."""


OTHERS: tuple[Draw, ...] = (pencil, bar, ball, box, nothing)


def drawn(thing: Draw, seed: int) -> Image.Image:
    """One drawing [SIDE, SIDE] in color."""
    dice = random.Random(seed)
    picture = _background(dice)
    thing(ImageDraw.Draw(picture), dice)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def latents_of(pictures: Sequence[Image.Image], ids: Sequence[str], space: str) -> Latents:
    """Latents [B, C, SIDE, SIDE] of a space whose linear view shows these pictures."""
    found = LatentSpace.get(space)
    view = found.rgb_view
    assert view is not None
    rgb = np.stack([np.asarray(picture, np.float64) / 255 for picture in pictures])
    wanted = rgb * 2 - 1 - np.array(view.bias)
    inverse = np.linalg.pinv(np.array(view.factors))
    tensor = torch.from_numpy((wanted @ inverse).transpose(0, 3, 1, 2).copy()).float()
    return Latents(tensor, space, scaled=view.scaled, ids=list(ids))


def cigarettes(count: int, space: str = "sdxl", seed: int = 0) -> Latents:
    """Latents of drawings of cigarette-like things."""
    pictures = [drawn(cigarette, seed + i) for i in range(count)]
    return latents_of(pictures, [f"cigarette-{i:03}" for i in range(count)], space)


def others(count: int, space: str = "sdxl", seed: int = 0) -> Latents:
    """Latents of drawings of other things, of each kind alike many."""
    kinds = [OTHERS[i % len(OTHERS)] for i in range(count)]
    pictures = [drawn(kind, seed + i) for i, kind in enumerate(kinds)]
    return latents_of(pictures, [f"{k.__name__}-{i:03}" for i, k in enumerate(kinds)], space)
