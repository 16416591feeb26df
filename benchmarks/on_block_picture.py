"""The picture of docs/guard.md: what stands in the place of a blocked image.

    python benchmarks/on_block_picture.py [OUT]

Of latents of examples/: the linear view, which is not returned, and what `on_block` gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from latentguard import load_latents
from latentguard.guard.answers import blurred, fitted
from latentguard.guard.blur import coarse
from latentguard.spaces import rgb_preview

ROOT = Path(__file__).resolve().parents[1]
SIDE, GAP, TITLE = 192, 8, 18
NAMES = ("revolver", "beer-glass-pagoda", "cat")
COLUMNS = ("(the view of its latents)", "blank", "blur", "placeholder")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "on-block.png"
    latents = load_latents(ROOT / "examples" / "latents.pt")
    ids = list(latents.ids or ())
    chosen = latents.pick([next(i for i, one in enumerate(ids) if name in one) for name in NAMES])
    views, grids = rgb_preview(chosen), coarse(chosen)
    black = Image.new("RGB", (SIDE, SIDE))
    placeholder = _placeholder()
    width, height = len(COLUMNS) * (SIDE + GAP) - GAP, len(NAMES) * (SIDE + GAP) - GAP + TITLE
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(COLUMNS):
        pen.text((column * (SIDE + GAP), 2), title, fill="black")
    for row, (view, grid) in enumerate(zip(views, grids, strict=True)):
        shown = Image.fromarray(np.asarray(view)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for column, one in enumerate((shown, black, blurred(grid, black), placeholder)):
            sheet.paste(one, (column * (SIDE + GAP), TITLE + row * (SIDE + GAP)))
    sheet.quantize(128).save(out, optimize=True)


def _placeholder() -> Image.Image:
    """A picture of one's own, wide, in the form of a square image."""
    own = Image.new("RGB", (240, 120), (70, 90, 120))
    ImageDraw.Draw(own).text((120, 60), "not available", fill="white", anchor="mm", font_size=28)
    found: Image.Image = fitted(own, Image.new("RGB", (SIDE, SIDE)))
    return found


if __name__ == "__main__":
    main()
