"""A cascade of one model with itself: nano-flux2 in int8 first, in fp32 where that is not sure.

    python benchmarks/cascade.py export LATENTS --exports DIR
    python benchmarks/cascade.py measure LATENTS --exports DIR

LATENTS: real ones of FLUX.2, of one size. int8 is calibrated on the first of them, the others are
judged, one after the other, by one guard after the other, twice; times are means over all images,
since some cost more than others. Decisions are compared with PyTorch's by the model alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from runtime import NANO, POLICY, RESULTS, THREADS

from latentguard import Latents, Scorer, load_encoder
from latentguard.export import export_onnx, swap_policy
from latentguard.files import load_latents
from latentguard.judge import Verdict
from latentguard.policy import Policy, load_policy
from latentguard.policy.models import Cascade
from latentguard.runtime import Guard

CALIBRATION = 100
UNSURE = (0.02, 0.05, 0.1)
ROUNDS = 2


def rules(unsure: float | None) -> Policy:
    """The policy without the concepts that a cascade cannot have, since the model sees none."""
    policy = load_policy(POLICY)
    seen = Scorer(policy, load_encoder(NANO, device="cpu")).bank.covered
    kept = tuple(c for c, visible in zip(policy.concepts, seen, strict=True) if visible)
    cascade = None if unsure is None else Cascade(first=NANO, unsure=unsure)
    return policy.model_copy(update={"concepts": kept, "cascade": cascade})


def file(folder: Path, unsure: float) -> Path:
    return folder / f"cascade-{unsure}.onnx"


def export(folder: Path, latents: Latents) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first = file(folder, UNSURE[0])
    export_onnx(
        *(rules(UNSURE[0]), NANO, first),
        size=(latents.height, latents.width),
        first_precision="int8",
        calibrate=latents[:CALIBRATION],
        progress=print,
    )
    for unsure in UNSURE[1:]:
        swap_policy(first, rules(unsure), file(folder, unsure))
    swap_policy(first, rules(None), folder / "fp32.onnx")


def measure(folder: Path, latents: Latents) -> dict[str, Any]:
    rest = latents[CALIBRATION:]
    scorer = Scorer(rules(None), NANO, device="cpu")
    wanted: list[Verdict] = []
    for begin in range(0, len(rest), 50):
        wanted += scorer.verdicts(rest[begin : begin + 50].to(torch.float32))
    images = rest.tensor.float().numpy()
    # A first file is a guard by itself.
    paths = {"fp32 alone": folder / "fp32.onnx"}
    paths["int8 alone"] = file(folder, UNSURE[0]).with_suffix(".first.onnx")
    paths |= {f"int8, then fp32 within {unsure}": file(folder, unsure) for unsure in UNSURE}
    times: dict[str, list[float]] = {name: [] for name in paths}
    found: dict[str, list[Verdict]] = {}
    escalated: dict[str, list[bool]] = {}
    for _ in range(ROUNDS):
        for name, path in paths.items():
            # One at a time: threads of several guards would wait for work on the same cores.
            with Guard(path, threads=THREADS) as guard:
                found[name], escalated[name] = [], []
                for image in images:
                    start = time.perf_counter()
                    judged = guard.judge(image[None])
                    times[name].append(1e3 * (time.perf_counter() - start))
                    found[name] += judged.verdicts
                    escalated[name] += judged.escalated or ()
    rows = [
        {
            "guard": name,
            "escalated": float(np.mean(escalated[name])) if escalated[name] else None,
            "ms": statistics.fmean(times[name]),
            "same_decisions": sum(
                a.decision == b.decision for a, b in zip(verdicts, wanted, strict=True)
            ),
        }
        for name, verdicts in found.items()
    ]
    return {"machine": machine(), "threads": THREADS, "images": len(images), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{result['machine']['cpu']}, {result['threads']} threads, {result['images']} photos, one "
        "at a time.",
        "",
        "| nano-flux2 in | passed on | ms an image | same decision as PyTorch |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        escalated = "-" if row["escalated"] is None else f"{100 * row['escalated']:.1f} %"
        same = f"{row['same_decisions']} of {result['images']}"
        lines.append(f"| {row['guard']} | {escalated} | {row['ms']:.1f} | {same} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("export", "measure"))
    parser.add_argument("latents", type=Path)
    parser.add_argument("--exports", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    latents = load_latents(given.latents)
    if given.step == "export":
        export(given.exports, latents)
        return
    result = measure(given.exports, latents)
    (RESULTS / "cascade.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "cascade.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
