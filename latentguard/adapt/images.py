"""Crops of photos: random ones for training, the middle for evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.encode.framing import Framing
from latentguard.encode.pictures import open_picture

SIZE = 256

# How much a crop may differ from the photo: share of its area, aspect ratio, color factors.
CROP_AREA = (0.45, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
COLOR = {"Brightness": (0.7, 1.3), "Contrast": (0.7, 1.3), "Color": (0.4, 1.6)}
COLOR_SHARE = 0.6


def random_crop(path: Path, seed: int, size: int = SIZE) -> NDArray[np.uint8]:
    """One crop of a photo, uint8 [size, size, 3]: random area, aspect, flip and color.

    The same seed gives the same crop, at any size.
    """
    from PIL import Image, ImageEnhance

    rng = random.Random(seed)
    image = open_picture(path)
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        aspect = exp(rng.uniform(log(CROP_ASPECT[0]), log(CROP_ASPECT[1])))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            break
    else:
        w = h = min(width, height)
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < COLOR_SHARE:
        for name, (low, high) in COLOR.items():
            enhance: Callable[[Any], Any] = getattr(ImageEnhance, name)
            image = enhance(image).enhance(rng.uniform(low, high))
    return np.asarray(image)


def center_crop(path: Path, size: int = SIZE) -> NDArray[np.uint8]:
    """The largest centered square of a picture, uint8 [size, size, 3]; for evaluation."""
    return Framing(size, multiple=1).apply(open_picture(path))[0]
