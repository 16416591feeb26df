"""At which size of an object recall falls: real ones in real scenes, whole and in crops.

    python benchmarks/objects.py CALTECH101 PHOTOS --autoencoder taef2_encoder.pth --cache DIR

Held-out revolvers of Caltech-101 (image number divisible by 5), scaled to a share of the scene and
pasted at a random place into photographs of other things; the negatives are the photographs bare.
PHOTOS is a folder of photographs that nothing was trained on; those whose names say a weapon are
left out. Encoded by the given autoencoder of FLUX.2 at each of --sizes. nano-flux2, weapons policy,
shipped thresholds; a photograph counts as flagged where any concept of the policy matches.
A pasted picture has edges, and often a white background, that no generated picture has.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import readers
import torch
from machine import machine
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from latentguard import Latents, Scorer, load_policy
from latentguard.adapt.hold_out import held_out
from latentguard.adapt.images import center_crop

RESULTS = Path(__file__).parent / "results"
SHARES = (0.02, 0.05, 0.12)
ARMED = (
    *("rifle", "revolver", "holster", "cannon", "missile", "tank", "projectile", "cuirass", "bow"),
    *("hatchet", "cleaver", "military", "warplane", "carrier", "bulletproof", "knife"),
)


def paste(
    scene: NDArray[np.uint8], file: Path, share: float, rng: random.Random
) -> NDArray[np.uint8]:
    """A picture scaled to a share of the scene's area, at a random place in it."""
    made, thing = Image.fromarray(scene).copy(), Image.open(file).convert("RGB")
    side = scene.shape[0]
    factor = (share * side**2 / (thing.width * thing.height)) ** 0.5
    thing = thing.resize(
        (round(thing.width * factor), round(thing.height * factor)), Image.Resampling.LANCZOS
    )
    made.paste(thing, (rng.randint(0, side - thing.width), rng.randint(0, side - thing.height)))
    return np.asarray(made)


def pictures(
    arguments: argparse.Namespace, size: int, scenes: int
) -> tuple[NDArray[np.uint8], list[str]]:
    """uint8 [N, size, size, 3], and what each is: "bare", or the share of its object."""
    rng = random.Random(size + 1)  # the scenes of `size` chose the lead
    harmless = [
        path
        for path in sorted(arguments.photos.iterdir())
        if not any(word in path.name.lower() for word in ARMED)
    ]
    made = [center_crop(path, size) for path in rng.sample(harmless, scenes)]
    kinds = ["bare"] * scenes
    objects = [f for f in sorted(arguments.caltech.glob("**/revolver/*.jpg")) if held_out(f, 5)]
    for share in SHARES:
        for number, file in enumerate(objects):
            made.append(paste(made[(7 * number + round(100 * share)) % scenes], file, share, rng))
            kinds.append(str(share))
    return np.stack(made), kinds


def flagged(
    scorer: Scorer, latents: Tensor, concept: str | None
) -> tuple[NDArray[np.bool_], float]:
    """Whether a concept (None is any) matches each image, and milliseconds an image."""
    found, began = [], time.perf_counter()
    for batch in latents.split(4):
        for verdict in scorer.verdicts(Latents(batch.float(), "flux2", scaled=True)):
            ids = {score.id for score in verdict.matched}
            found.append(bool(ids) if concept is None else concept in ids)
    return np.array(found), 1e3 * (time.perf_counter() - began) / len(latents)


def measure(latents: Tensor, kinds: list[str], views: Any) -> dict[str, Any]:
    scorer = Scorer(load_policy("weapons").with_views(views), "nano-flux2")
    kind = np.array(kinds)
    guns, _ = flagged(scorer, latents[torch.from_numpy(kind != "bare")], "handguns")
    any_, ms = flagged(scorer, latents[torch.from_numpy(kind == "bare")], None)
    shown = kind[kind != "bare"]
    recall = {str(share): float(guns[shown == str(share)].mean()) for share in SHARES}
    return {"recall": recall, "flagged": int(any_.sum()), "bare": len(any_), "ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("caltech", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--scenes", type=int, default=60)
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        made, kinds = pictures(arguments, size, arguments.scenes)
        latents = readers.encode(
            made, arguments.autoencoder, arguments.cache / f"objects{size}.npy"
        )
        objects = kinds.count(str(SHARES[0]))
        for views in ("whole", "crops"):
            row = {"size": size, "views": views, "objects": objects}
            rows.append({**row, **measure(latents, kinds, views)})
    told = {"machine": machine(), "rows": rows}
    (RESULTS / "objects.json").write_text(json.dumps(told, indent=1) + "\n")
    shares = " | ".join(f"recall, {share:.0%} of the picture" for share in SHARES)
    lines = [
        "nano-flux2, `weapons`, shipped thresholds, TAEF2's latents; {cpu}, {cores} cores, "
        "torch {torch}.".format(**machine()),
        "",
        f"| picture | views | objects | {shares} | bare photos flagged | ms a picture |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        recall = " | ".join(f"{row['recall'][str(share)]:.2f}" for share in SHARES)
        lines.append(
            f"| {row['size']} px | {row['views']} | {row['objects']} | {recall} | "
            f"{row['flagged']} of {row['bare']} | {row['ms']:.0f} |"
        )
    (RESULTS / "objects.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
