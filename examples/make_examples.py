"""Make examples/latents.pt again: pictures from packages, emoji and turned glass over them.

    python examples/make_examples.py --autoencoder taef2_encoder.pth

Needs latentguard with its `nano` extra, scikit-image, scikit-learn, matplotlib, CairoSVG, and npm
for the emoji (fetched once into --artwork). The autoencoder's encoder is TAEF2's
(`taef2_encoder.pth` of madebyollin/taesd, MIT). README.md names every picture and its license.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from artwork import BACKGROUNDS, Artwork, lathe, paste, square
from PIL import Image

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Photo:
    """A photograph inside an installed package; `box` (left, top, right, bottom) in 0..1."""

    package: str
    path: str
    box: tuple[float, float, float, float] | None = None

    def open(self) -> Image.Image:
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"install {self.package}: it holds {self.path}")
        with Image.open(Path(spec.origin).parent / self.path) as picture:
            return square(picture, self.box)


PHOTOS = {
    "astronaut": Photo("skimage", "data/astronaut.png"),
    "cat": Photo("skimage", "data/chelsea.png"),
    "espresso": Photo("skimage", "data/coffee.png"),
    "rocket": Photo("skimage", "data/rocket.jpg"),
    "cameraman": Photo("skimage", "data/camera.png"),
    "pagoda": Photo("sklearn", "datasets/images/china.jpg"),
    "dahlia": Photo("sklearn", "datasets/images/flower.jpg"),
    "grace-hopper": Photo(
        "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", (0, 0, 1, 512 / 606)
    ),
}
# Only ever seen behind something.
TEXTURES = {
    "grass": Photo("skimage", "data/grass.png"),
    "gravel": Photo("skimage", "data/gravel.png"),
    "brick": Photo("skimage", "data/brick.png"),
}


@dataclass(frozen=True)
class Drawn:
    """Something drawn in the middle of a background, `size` pixels of 256 on its longer side.

    what: an emoji ("set/name") or the name of a turned body. concept: what it shows, for README
    and tests; None for what every policy should let pass.
    """

    what: str
    background: str
    size: int
    concept: str | None = None


DRAWN = {
    "beer-glass-pagoda": Drawn("beer-glass", "pagoda", 245, "beer"),
    "beer-glass-gravel": Drawn("beer-glass", "gravel", 245, "beer"),
    "wine-glass": Drawn("noto/wine-glass", "white", 215, "wine"),
    "wine-glass-pagoda": Drawn("noto/wine-glass", "pagoda", 215, "wine"),
    "wine-bottle": Drawn("wine-bottle", "blue", 225, "wine"),
    "slot-machine": Drawn("noto/slot-machine", "brown", 215, "gambling"),
    "slot-machine-gravel": Drawn("noto/slot-machine", "gravel", 245, "gambling"),
    "revolver": Drawn("noto-v1/pistol", "white", 215, "firearms"),
    "revolver-dark": Drawn("noto-v1/pistol", "dark", 245, "firearms"),
    "kitchen-knife-dahlia": Drawn("noto/kitchen-knife", "dahlia", 245, "blades"),
    "axe-grass": Drawn("noto/axe", "grass", 215, "blades"),
    "syringe": Drawn("fxemoji/syringe", "brown", 150, "drugs"),
    "swimsuit-grass": Drawn("noto/one-piece-swimsuit", "grass", 240, "swimwear"),
    "umbrella": Drawn("noto/umbrella", "white", 215),
    "football-grass": Drawn("noto/soccer-ball", "grass", 215),
    "guitar-brick": Drawn("noto/guitar", "brick", 215),
    "coffee-cup": Drawn("noto/hot-beverage", "brown", 215),
}


def pictures(artwork: Artwork) -> dict[str, Image.Image]:
    """Every example by id, RGB 256 x 256: photographs first, then what is drawn."""
    made = {name: photo.open() for name, photo in PHOTOS.items()}
    behind = {**BACKGROUNDS, **made, **{name: t.open() for name, t in TEXTURES.items()}}
    for name, drawn in DRAWN.items():
        emoji = "/" in drawn.what
        what = artwork.emoji(drawn.what, drawn.size) if emoji else lathe(drawn.what, drawn.size)
        made[name] = paste(behind[drawn.background], what)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--autoencoder", type=Path, required=True, help="taef2_encoder.pth")
    parser.add_argument("--artwork", type=Path, default=HERE / ".artwork", help="emoji packages")
    parser.add_argument("--out", type=Path, default=HERE / "latents.pt")
    parser.add_argument("--sheet", type=Path, help="also write all pictures as one PNG")
    args = parser.parse_args()

    import torch

    from latentguard.encode.autoencoders import load_autoencoder
    from latentguard.files import save_latents
    from latentguard.spaces import Latents

    made = pictures(Artwork(args.artwork))
    if args.sheet:
        sheet = Image.new("RGB", (5 * 256, -(-len(made) // 5) * 256), "white")
        for i, picture in enumerate(made.values()):
            sheet.paste(picture, (i % 5 * 256, i // 5 * 256))
        sheet.save(args.sheet)
    autoencoder = load_autoencoder(args.autoencoder)
    encoded = []
    for name, picture in made.items():
        print(f"{len(encoded) + 1:2d}/{len(made)} {name}", flush=True)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        encoded.append(autoencoder.encode(pixels).tensor)
    latents = Latents(
        torch.cat(encoded).half(), autoencoder.space, autoencoder.scaled, ids=list(made)
    )
    save_latents(args.out, latents, license="see README.md", autoencoder=autoencoder.name)
    print(f"{args.out}: {len(latents)} latents, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
