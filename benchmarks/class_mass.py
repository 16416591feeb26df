"""Whether a concept's summed class mass tells more than its best prompt does.

    python benchmarks/class_mass.py PHOTOS --names names.txt --labels labels.txt \\
        --autoencoder taef2_encoder.pth --cache DIR

A concept is a group of ImageNet classes (dogs, boats, guns ...), and its prompts are the names of
some of them, drawn five times. Its pictures are the photographs of every class of the group; all
other photographs are negatives. Scores are without contrast prompts. PHOTOS as in zeroshot.py.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import readers
from numpy.typing import NDArray

from latentguard.adapt.images import center_crop
from latentguard.encode.folders import find_pictures
from latentguard.encoders.nano import load_nano
from latentguard.evaluate.metrics import auroc, count

RESULTS = Path(__file__).parent / "results"
RATE = 0.01
DRAWS = 5
RANGES = {
    "dogs": ((151, 269),),
    "cats": ((281, 286),),
    "big cats": ((286, 294),),
    "snakes": ((52, 69),),
    "lizards": ((38, 49),),
    "turtles": ((33, 38),),
    "spiders": ((72, 79),),
    "fish": ((0, 7), (389, 398)),
    "insects": ((300, 327),),
    "apes and monkeys": ((365, 385),),
    "bears": ((294, 298),),
    "fruit": ((948, 958),),
    "mushrooms": ((991, 998),),
    "birds": ((7, 25), (80, 101), (127, 147)),
    "wolves and foxes": ((269, 281),),
    "hoofed animals": ((339, 356),),
    "guns": ((413, 414), (763, 765)),
}
WORDS = {
    "boats": "canoe yawl catamaran trimaran schooner gondola liner fireboat speedboat lifeboat",
    "bottles": "bottle goblet jug",
    "cars": "limousine convertible jeep minivan cab racer pickup",
    "music": "guitar violin piano drum flute oboe sax trombone harp cello banjo accordion",
    "clothes": "coat gown jersey cardigan sweatshirt suit poncho kimono bikini trunks",
    "balls": "ball",
    "computers": "computer laptop notebook keyboard monitor mouse screen",
}


def groups(names: list[str]) -> dict[str, list[int]]:
    """Class numbers by group."""
    found = {name: [i for pair in pairs for i in range(*pair)] for name, pairs in RANGES.items()}
    for name, words in WORDS.items():
        wanted = set(words.split())
        found[name] = [
            i
            for i, text in enumerate(names)
            if wanted & set(text.lower().replace(",", " ").split())
        ]
    return found


def scores(images: NDArray[np.float32], prompts: NDArray[np.float32]) -> dict[str, NDArray]:
    """Each picture's score of a concept, by way. images [B, D], prompts [P, D], unit norm."""
    best = (images @ prompts.T).max(1)
    together = np.sqrt((prompts**2).mean(0))
    summed = images @ (together / np.linalg.norm(together))
    return {
        "best prompt": best,
        "cosine with the summed weighting": summed,
        "summed mass": images**2 @ (prompts**2).sum(0),
        "the better of best prompt and sum": np.maximum(best, summed),
    }


def recall(scores: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """At the threshold that a hundredth of the negatives exceed."""
    return float((scores[positive] > np.quantile(scores[~positive], 1 - RATE)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    a = parser.parse_args()
    names = a.names.read_text().splitlines()
    labels = np.array([int(line) for line in a.labels.read_text().split()])
    pictures = np.stack([center_crop(file) for file in find_pictures([a.photos])])
    latents = readers.encode(pictures, a.autoencoder, a.cache / "zeroshot-256.npy")
    embedded = {"nano-flux2": readers.flux2(latents), "teacher": readers.teacher(pictures)}
    encoder = load_nano("nano-flux2")
    rows = []
    for reader, images in embedded.items():
        for drawn in (2, 3, 5):
            found: dict[str, list[tuple[float, float]]] = {}
            for group, classes in groups(names).items():
                positive = np.isin(labels, classes)
                if positive.sum() < 2:
                    continue
                for draw in range(DRAWS):
                    rng = random.Random(f"{group}{draw}{drawn}")
                    some = rng.sample(classes, min(drawn, len(classes)))
                    prompts = encoder.encode_text([names[i].split(",")[0] for i in some])
                    for way, score in scores(images.numpy(), prompts.numpy()).items():
                        area = float(auroc(count(score[positive], score[~positive])))
                        found.setdefault(way, []).append((area, recall(score, positive)))
            for way, pairs in found.items():
                area, caught = np.mean(pairs, 0).tolist()
                row = {"reader": reader, "prompts": drawn, "way": way, "trials": len(pairs)}
                rows.append({**row, "auroc": area, "recall": caught})
    head = ("reader", "prompts", "score", "AUROC", f"recall at {RATE:.0%} false positives")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        lines.append(
            f"| {row['reader']} | {row['prompts']} | {row['way']} | {row['auroc']:.3f} | "
            f"{row['recall']:.3f} |"
        )
    print("\n".join(lines))
    (RESULTS / "class_mass.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "class_mass.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
