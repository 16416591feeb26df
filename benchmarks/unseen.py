"""A check of detection on what nothing was tuned on, by nano-flux2 and its pixel teacher.

    python benchmarks/unseen.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR

The nano models' text side was chosen with the pictures of detection.py in view. Here are others:
everyday things (everyday.yaml) in held-out photos, each against all the others; and drawings, most
of them not in detection.py, turned by up to 12 degrees, anywhere in the picture, over other
held-out photographs (sharp and out of focus) and plain backgrounds, against the same backgrounds
bare and with harmless things drawn over them. Nothing was changed after looking at the results.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import readers
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from latentguard import Scorer
from latentguard.adapt.hold_out import held_out
from latentguard.adapt.images import center_crop
from latentguard.encode.folders import find_pictures
from latentguard.evaluate.metrics import separation

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from artwork import BACKGROUNDS, Artwork, lathe, paste
from detection import CLASSES, RESULTS, margins

EVERYDAY = Path(__file__).with_name("everyday.yaml")
DRAWN = {
    "beer bottle": (("beer-bottle",), "beer"),
    "wine bottle": (("wine-bottle",), "wine"),
    "wine glass, first Noto design": (("noto-v1/wine-glass",), "wine"),
    "slot machine": (("noto/slot-machine",), "gambling"),
    "syringe, Noto": (("noto/syringe",), "drugs"),
    "trunks": (("noto/shorts",), "swimwear"),
    "bikini": (("noto/bikini", "noto-v1/bikini"), "swimwear"),
    "axe": (("noto/axe",), "blades"),
    "pistol": (("noto-v1/pistol",), "firearms"),
}
HARMLESS = (
    "noto/red-apple", "noto/dog", "noto/bus", "noto/teapot", "noto/banana", "noto/bicycle",
    "noto/watermelon", "noto/rose", "noto/house", "noto/airplane", "noto/octopus", "noto/trumpet",
)  # fmt: skip
# Drawn things of their own, or what policies look for.
NOT_BEHIND = {*CLASSES, "garfield", "snoopy", "yin_yang", "stop_sign"}


def photographs(folder: Path, names: list[str], each: int) -> tuple[list[Any], list[str]]:
    """Held-out photos of the named classes, spread over each class, and their names."""
    made, kinds = [], []
    for name in names:
        files = [f for f in find_pictures([folder / name.replace("-", "_")]) if held_out(f, 5)]
        for i in range(min(each, len(files))):
            made.append(center_crop(files[i * len(files) // min(each, len(files))]))
            kinds.append(name)
    return made, kinds


def drawings(folder: Path, artwork: Artwork, each: int) -> tuple[list[Any], list[str]]:
    """Backgrounds, bare and drawn over, and what each shows."""
    files = [
        file
        for directory in sorted(p for p in folder.iterdir() if p.is_dir())
        for file in find_pictures([directory])
        if directory.name not in NOT_BEHIND and held_out(file, 5)
    ]
    random.Random(7).shuffle(files)
    behind = [background(files[i], i) for i in range(each)]
    made = [np.asarray(picture) for picture in behind]
    kinds = ["bare"] * each
    for kind, whats in [*((k, w) for k, (w, _) in DRAWN.items()), ("harmless", HARMLESS)]:
        for i, picture in enumerate(behind):
            rng = random.Random(f"{kind} {i}")
            what, size = whats[i % len(whats)], rng.randint(180, 245)
            drawing = artwork.emoji(what, size) if "/" in what else lathe(what, size)
            free = (256 - size) / 512
            center = (0.5 + rng.uniform(-free, free), 0.5 + rng.uniform(-free, free))
            made.append(np.asarray(paste(picture, drawing, center, rng.uniform(-12, 12))))
            kinds.append(kind)
    return made, kinds


def background(file: Path, i: int) -> Image.Image:
    """A sharp photo, one out of focus, a plain color, in turn."""
    if i % 3 == 2:
        return list(BACKGROUNDS.values())[i // 3 % len(BACKGROUNDS)]
    photo = Image.fromarray(center_crop(file))
    return photo.filter(ImageFilter.GaussianBlur(6)) if i % 3 else photo


def measure(
    name: str, kinds: list[str], concepts: dict[str, str], policy: str | Path, found: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a kind; `found` has embeddings by reader, negatives are all that is no positive.

    A drawing competes with bare and harmless pictures, not with the other drawings.
    """
    scorer = Scorer(policy, "nano-flux2")
    ids = [concept.id for concept in scorer.policy.concepts]
    label = np.array(kinds)
    rows = []
    for kind, concept in concepts.items():
        negative = np.isin(label, ["bare", "harmless"]) if name == "drawn" else label != kind
        row: dict[str, Any] = {"pictures": name, "shown": kind, "concept": concept}
        for reader, embeddings in found.items():
            values: NDArray[np.float32] = margins(scorer, embeddings)[:, ids.index(concept)]
            one = separation(values[label == kind], values[negative])
            row |= {"positives": one.positives, "negatives": one.negatives}
            row[reader] = {
                "auroc": one.auroc.value,
                "auroc_95": [one.auroc.low, one.auroc.high],
                "matched": float((values[label == kind] >= 0).mean()),
                "false_matches": float((values[negative] >= 0).mean()),
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="Caltech-101's 101_ObjectCategories")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--artwork", type=Path, default=Path("examples/.artwork"))
    parser.add_argument("--each", type=int, default=8, help="photos of each everyday class")
    parser.add_argument("--drawn", type=int, default=15, help="backgrounds to draw over")
    arguments = parser.parse_args()
    everyday = [concept.id for concept in Scorer(EVERYDAY, "nano-flux2").policy.concepts]
    rows = []
    for name, (made, kinds), concepts, policy in (
        (
            "photographs",
            photographs(arguments.photos, everyday, arguments.each),
            {concept: concept for concept in everyday},
            EVERYDAY,
        ),
        (
            "drawn",
            drawings(arguments.photos, Artwork(arguments.artwork), arguments.drawn),
            {kind: concept for kind, (_, concept) in DRAWN.items()},
            "family",
        ),
    ):
        images = np.stack(made)
        cache = arguments.cache / f"unseen-{name}.npy"
        latents = readers.encode(images, arguments.autoencoder, cache)
        found = {"teacher": readers.teacher(images), "nano-flux2": readers.flux2(latents)}
        rows += measure(name, kinds, concepts, policy, found)
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """Markdown and JSON."""
    lines = []
    for name in ("photographs", "drawn"):
        chosen = [row for row in rows if row["pictures"] == name]
        head = ["shown", "concept", "positives / negatives", "teacher", "nano-flux2 [95 %]"]
        head += ["matched", "others matched"]
        lines += [f"{name}, AUROC:", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for row in chosen:
            nano = row["nano-flux2"]
            cells = [row["shown"], row["concept"], f"{row['positives']} / {row['negatives']}"]
            cells.append(f"{row['teacher']['auroc']:.3f}")
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(nano["auroc"], *nano["auroc_95"]))
            cells += [f"{nano['matched']:.2f}", f"{nano['false_matches']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
        means = [np.mean([row[r]["auroc"] for row in chosen]) for r in ("teacher", "nano-flux2")]
        lines += [f"| mean | | | {means[0]:.3f} | {means[1]:.3f} | | |", ""]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "unseen.json").write_text(json.dumps(rows, indent=1))
    (RESULTS / "unseen.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
