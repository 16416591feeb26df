"""How many photographs a policy flags in crops, by the lead that a crop's margin has to have.

    python benchmarks/leads.py PHOTOS --autoencoder taef2_encoder.pth --cache DIR

The lead of encoders/crops.py was chosen by this table. PHOTOS are those of objects.py; the scenes
that objects.py measures on are left out, and so are photographs whose names say a weapon.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import readers
import torch
from detection import margins
from objects import ARMED
from torch import Tensor

from latentguard import Scorer
from latentguard.adapt.images import center_crop
from latentguard.encode.folders import find_pictures
from latentguard.encoders import load_encoder
from latentguard.encoders.crops import Crops

RESULTS = Path(__file__).parent / "results"
LEADS = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
POLICIES = ("weapons", "family", "default")


def views(latents: Tensor) -> Tensor:
    """Embeddings [N, views, D] of the whole and of its crops."""
    encoder = Crops(load_encoder("nano-flux2"))
    with torch.inference_mode():
        return torch.stack([encoder.features(one[None].float()).pooled for one in latents])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--scenes", type=int, default=60, help="of objects.py")
    a = parser.parse_args()
    files = find_pictures([a.photos])
    harmless = [f for f in files if not any(word in f.name.lower() for word in ARMED)]
    measured = set(random.Random(a.size + 1).sample(sorted(harmless), a.scenes))
    some = [files[i] for i in np.linspace(0, len(files) - 1, 60).astype(int)]
    chosen = [f for f in some if f in harmless and f not in measured]
    pictures = np.stack([center_crop(file, a.size) for file in chosen])
    cache = a.cache / f"leads{a.size}.npy"
    embedded = views(readers.encode(pictures, a.autoencoder, cache))
    count, crops = len(embedded), embedded.shape[1] - 1
    rows = []
    for policy in POLICIES:
        scorer = Scorer(policy, "nano-flux2")
        concepts = scorer.policy.concepts
        found = margins(scorer, embedded.flatten(0, 1)).reshape(count, crops + 1, len(concepts))
        needed = [
            scorer.bound.threshold(k) if scorer.bound.covered[k] else np.inf
            for k in range(len(concepts))
        ]
        above = found - np.array(needed)
        for lead in LEADS:
            led = np.concatenate([above[:, :1], above[:, 1:] - lead], 1).max(1) >= 0
            row = {"policy": policy, "size": a.size, "crops": crops, "photos": count, "lead": lead}
            rows.append({**row, "any": int(led.any(1).sum()), "one": int(led.sum(0).max())})
    lines = ["| policy | px | crops | photos | lead | flagged | by one concept at most |"]
    lines.append("| --- " * 7 + "|")
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    print("\n".join(lines))
    (RESULTS / "leads.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "leads.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
