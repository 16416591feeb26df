"""Which photos of a numbered set are kept out of training."""

from __future__ import annotations

import re
from pathlib import Path


def held_out(path: Path, every: int) -> bool:
    """Whether the last number in the file's name is a multiple of `every`; no number is kept in.

    For sets such as Caltech-101 (image_0001.jpg ...), whose classes then lose the same share.
    """
    numbers = re.findall(r"\d+", path.stem)
    return bool(numbers) and int(numbers[-1]) % every == 0
