"""How many harmless photographs the shipped policies match, by concept, at 512 px.

    python benchmarks/harmless.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR

The photographs are --count of Caltech-101's held-out fifth (image number divisible by 5), without
the classes that some policy forbids. They are encoded by the given autoencoder of FLUX.2 and read
by nano-flux2, and by nano-view through FLUX.2's linear view, at the shipped thresholds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import readers

from latentguard import Latents, Scorer
from latentguard.adapt.hold_out import held_out
from latentguard.adapt.images import center_crop
from latentguard.encode.folders import find_pictures
from latentguard.encoders.nano import load_nano
from latentguard.evaluate.metrics import wilson

RESULTS = Path(__file__).parent / "results"
FORBIDDEN = ("revolver", "cannon")
POLICIES = ("default", "family", "weapons")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("caltech", type=Path)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    a = parser.parse_args()
    photos = [
        file
        for file in find_pictures([a.caltech])
        if held_out(file, 5) and file.parent.name not in FORBIDDEN
    ]
    chosen = random.Random(3).sample(photos, a.count)
    pictures = np.stack([center_crop(file, 512) for file in chosen])
    latents = readers.encode(pictures, a.autoencoder, a.cache / "harmless512.npy").float()
    rows = []
    for model in ("nano-view", "nano-flux2"):
        encoder = load_nano(model, space="flux2" if model == "nano-view" else None)
        for policy in POLICIES:
            scorer = Scorer(policy, encoder)
            found: Counter[str] = Counter()
            shown: dict[str, Counter[str]] = {}
            for first in range(0, len(latents), 10):
                batch = Latents(latents[first : first + 10], "flux2", scaled=True)
                for place, verdict in enumerate(scorer.verdicts(batch)):
                    for concept in verdict.matched:
                        found[concept.id] += 1
                        kind = chosen[first + place].parent.name
                        shown.setdefault(concept.id, Counter())[kind] += 1
            for concept in scorer.policy.concepts:
                count = found[concept.id]
                if count:
                    interval = wilson(count, len(latents))
                    row = {"model": model, "policy": policy, "concept": concept.id}
                    row |= {"action": concept.action, "matched": count, "photos": len(latents)}
                    row |= {"share_95": [interval.low, interval.high]}
                    rows.append({**row, "of": dict(shown[concept.id].most_common())})
    lines = ["| model | policy | concept | action | matched | share [95 %] | photos of |"]
    lines.append("| --- " * 7 + "|")
    for row in rows:
        low, high = row["share_95"]
        share = f"{row['matched'] / row['photos']:.3f} [{low:.3f}, {high:.3f}]"
        kinds = ", ".join(f"{name} {count}" for name, count in row["of"].items())
        cells = [row[key] for key in ("model", "policy", "concept", "action", "matched")]
        lines.append(f"| {' | '.join(map(str, [*cells, share, kinds]))} |")
    print("\n".join(lines))
    (RESULTS / "harmless.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "harmless.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
