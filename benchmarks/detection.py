"""Detection of policy concepts by the nano models, beside their pixel teacher's.

    python benchmarks/detection.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR

Photos: the held-out fifth of a Caltech-101 folder (image number divisible by 5). Its revolvers and
cannons are positives, up to --per-class photos of every other class negatives. What Caltech cannot
show is drawn large over held-out photographs (beer, wine, slot machine, syringe, swimsuit, knife,
pistol; artwork of examples/); the negatives are the same photographs bare and with harmless things
drawn over them in the same way. Scores are margins under the family policy.
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
from PIL import Image
from torch import Tensor

from latentguard import Scorer, ops
from latentguard.adapt.hold_out import held_out
from latentguard.adapt.images import center_crop
from latentguard.encode.folders import find_pictures
from latentguard.evaluate.metrics import separation

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from artwork import Artwork, lathe, paste

RESULTS = Path(__file__).parent / "results"
CLASSES = {"revolver": "firearms", "cannon": "military"}
DRAWN = {
    "beer glass": ("beer-glass", "beer"),
    "wine glass": ("noto/wine-glass", "wine"),
    "slot machine": ("noto/slot-machine", "gambling"),
    "syringe": ("fxemoji/syringe", "drugs"),
    "swimsuit": ("noto/one-piece-swimsuit", "swimwear"),
    "knife": ("noto/kitchen-knife", "blades"),
    "pistol": ("noto-v1/pistol", "firearms"),
}
HARMLESS = ("noto/umbrella", "noto/soccer-ball", "noto/guitar", "noto/hot-beverage")
SIZES = (190, 245)


def draw(
    artwork: Artwork, what: str, photo: NDArray[np.uint8], rng: random.Random
) -> NDArray[np.uint8]:
    """Something over a photograph: 190 to 245 of 256 pixels, a little off the middle."""
    size = rng.randint(*SIZES)
    drawing = artwork.emoji(what, size) if "/" in what else lathe(what, size)
    center = (0.5 + rng.uniform(-0.06, 0.06), 0.5 + rng.uniform(-0.03, 0.03))
    return np.asarray(paste(Image.fromarray(photo), drawing, center))


def pictures(arguments: argparse.Namespace) -> tuple[NDArray[np.uint8], list[str]]:
    """All pictures uint8 [N, 256, 256, 3] and what each is."""
    rng = random.Random(0)
    made: list[NDArray[np.uint8]] = []
    kinds: list[str] = []
    others = []
    for folder in sorted(path for path in arguments.photos.iterdir() if path.is_dir()):
        files = [file for file in find_pictures([folder]) if held_out(file, 5)]
        positive = folder.name in CLASSES
        for file in files if positive else files[: arguments.per_class]:
            made.append(center_crop(file))
            kinds.append(folder.name if positive else "photo")
            if not positive:
                others.append(len(made) - 1)
    artwork = Artwork(arguments.artwork)
    behind = rng.sample(others, arguments.drawn)
    for name, (what, _) in DRAWN.items():
        for index in behind:
            made.append(draw(artwork, what, made[index], rng))
            kinds.append(name)
    for number, index in enumerate(behind):
        made.append(draw(artwork, HARMLESS[number % len(HARMLESS)], made[index], rng))
        kinds.append("harmless")
    return np.stack(made), kinds


def margins(scorer: Scorer, posterior: Tensor) -> NDArray[np.float32]:
    """Margins [N, K] of root posteriors under the scorer's policy."""
    bank = scorer.bank
    texts = (bank.embeddings, bank.segments, bank.contrast, bank.contrast_segments)
    scale = scorer.encoder.logit_scale
    _, found, _ = ops.concept_similarity(posterior, None, None, 0.0, None, *texts, scale)
    return found.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="Caltech-101's 101_ObjectCategories")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--artwork", type=Path, default=Path("examples/.artwork"))
    parser.add_argument("--per-class", type=int, default=4)
    parser.add_argument("--drawn", type=int, default=24, help="photographs to draw over")
    arguments = parser.parse_args()
    images, kinds = pictures(arguments)
    print(f"{len(images)} pictures", file=sys.stderr)
    latents = readers.encode(images, arguments.autoencoder, arguments.cache / "detection-256.npy")
    scorer = Scorer("family", "nano-flux2")
    ids = [concept.id for concept in scorer.policy.concepts]
    found = {
        "teacher": margins(scorer, readers.teacher(images)),
        "nano-flux2": margins(scorer, readers.flux2(latents)),
    }
    concepts = {**CLASSES, **{name: concept for name, (_, concept) in DRAWN.items()}}
    label = np.array(kinds)
    rows: list[dict[str, Any]] = []
    for kind, concept in concepts.items():
        # A drawing competes with the same photographs, bare and with harmless drawings.
        negative = np.isin(label, ["photo"] if kind in CLASSES else ["photo", "harmless"])
        for reader, values in found.items():
            column = values[:, ids.index(concept)]
            result = separation(column[label == kind], column[negative])
            rows.append(
                {
                    "shown": kind,
                    "concept": concept,
                    "reader": reader,
                    "positives": result.positives,
                    "negatives": result.negatives,
                    "auroc": result.auroc.value,
                    "auroc_95": [result.auroc.low, result.auroc.high],
                    "average_precision": result.average_precision.value,
                    "fpr_at_95_recall": result.fpr_at_recall.value,
                    "matched": float((column[label == kind] >= 0).mean()),
                    "false_matches": float((column[negative] >= 0).mean()),
                }
            )
    write(rows, concepts, list(found))


def write(rows: list[dict[str, Any]], concepts: dict[str, str], readers_: list[str]) -> None:
    """AUROC by reader, and everything for nano-flux2, as Markdown and JSON."""
    by = {(row["shown"], row["reader"]): row for row in rows}
    head = ["shown", "concept", "n", *readers_]
    lines = ["AUROC:", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for kind, concept in concepts.items():
        values = [f"{by[kind, reader]['auroc']:.3f}" for reader in readers_]
        cells = [kind, concept, str(by[kind, "teacher"]["positives"]), *values]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "nano-flux2 (matched: share at or above probability 0.5):", ""]
    head = ["shown", "AUROC [95 %]", "average precision", "FPR at 95 % recall", "matched"]
    head.append("harmless matched")
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for kind in concepts:
        row = by[kind, "nano-flux2"]
        low, high = row["auroc_95"]
        cells = [kind, f"{row['auroc']:.3f} [{low:.3f}, {high:.3f}]"]
        cells += [f"{row['average_precision']:.3f}", f"{row['fpr_at_95_recall']:.3f}"]
        cells += [f"{row['matched']:.2f}", f"{row['false_matches']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "detection.json").write_text(json.dumps(rows, indent=1))
    (RESULTS / "detection.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
