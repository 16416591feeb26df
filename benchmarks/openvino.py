"""Exported guards on OpenVINO's provider against the CPU provider of the same ONNX Runtime.

    python benchmarks/openvino.py LATENTS... --exports DIR

Needs onnxruntime-openvino in place of onnxruntime, and no torch. DIR is what `runtime.py export`
wrote. Both providers are guards in one process and take turns, so that ratios hold where the
machine's speed changes; times are medians over all turns, and the best one. LATENTS, real ones of
FLUX.2, tell whether nano-flux2 decides alike; Latent-CLIP reads noise, and embeddings are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from numpy.typing import NDArray
from runtime import CALIBRATION, CLIPS, NANO, RESULTS, THREADS, arrays, exported

from latentguard.files import read_arrays
from latentguard.runtime import Guard

OPENVINO = "OpenVINOExecutionProvider"
PROVIDERS: dict[str, Any] = {
    "CPU": "CPUExecutionProvider",
    "OpenVINO": (OPENVINO, {"device_type": "CPU", "num_of_threads": str(THREADS)}),
}
PRECISIONS = ("fp32", "int8")
TURNS = 5


def row(path: Path, model: str, cells: int, latents: NDArray[np.float32]) -> dict[str, Any]:
    """Both providers on one file."""
    guards = {
        name: Guard(path, providers=[provider], threads=THREADS)
        for name, provider in PROVIDERS.items()
    }
    found: dict[str, Any] = {}
    for batch, turns, calls in ((1, TURNS, 2 if "b4" in model else 8), (16, 2, 1)):
        array = arrays(model, batch, cells)
        times: dict[str, list[float]] = {name: [] for name in guards}
        for _ in range(turns):
            for name, guard in guards.items():
                guard.scores(array)
                for _ in range(calls):
                    start = time.perf_counter()
                    guard.scores(array)
                    times[name].append(1e3 * (time.perf_counter() - start))
        for name, taken in times.items():
            found[f"{name} batch {batch}"] = statistics.median(taken)
            found[f"{name} batch {batch} best"] = min(taken)
    return found | agreement(guards, latents)


def agreement(guards: dict[str, Guard], latents: NDArray[np.float32]) -> dict[str, Any]:
    """How far OpenVINO's scores are from the CPU provider's."""
    margin, cosine, same = 0.0, 1.0, 0
    for start in range(0, len(latents), 16):
        part = latents[start : start + 16]
        one, other = (guard.scores(part) for guard in guards.values())
        margin = max(margin, float(np.abs(one["margin"] - other["margin"]).max()))
        cosine = min(cosine, float((one["embedding"] * other["embedding"]).sum(1).min()))
        decided = [[v.decision for v in guard.scan(part)] for guard in guards.values()]
        same += sum(a == b for a, b in zip(*decided, strict=True))
    return {
        "latents": len(latents),
        "margin_max": margin,
        "cosine_min": cosine,
        "same_decision": same / len(latents),
    }


def judged(files: Sequence[Path]) -> NDArray[np.float32]:
    """All latents but those that int8 was calibrated on, [N, C, H, W]."""
    found = [record.latents for record in read_arrays(files, "flux2", True)]
    kept = [one for place, one in enumerate(found) if place % CALIBRATION and one is not None]
    return np.concatenate([one.standard().array for one in kept]).astype(np.float32)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | precision | ms, batch 1: CPU provider (best) | OpenVINO (best) | ms an image, "
        "batch 16: CPU provider | OpenVINO | margins differ by at most | smallest cosine | "
        "same decision |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in rows:
        cells = [one["model"], one["precision"]]
        for name in PROVIDERS:
            cells.append(f"{one[f'{name} batch 1']:.1f} ({one[f'{name} batch 1 best']:.1f})")
        cells += [f"{one[f'{name} batch 16'] / 16:.1f}" for name in PROVIDERS]
        cells += [f"{one['margin_max']:.2g}", f"{one['cosine_min']:.6f}"]
        real = one["model"] == NANO
        cells.append(f"{100 * one['same_decision']:.2f} % of {one['latents']:,}" if real else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("latents", type=Path, nargs="+")
    parser.add_argument("--exports", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(NANO, *CLIPS), default=[NANO, *CLIPS])
    arguments = parser.parse_args()
    path = RESULTS / "openvino.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [one for one in before if one["model"] not in arguments.only]
    for model in arguments.only:
        cells = 32 if model == NANO else 64
        latents = arrays(model, 8, cells)
        if model == NANO:
            latents = judged(arguments.latents)
        for precision in PRECISIONS:
            found = row(exported(arguments.exports, model, precision, cells), model, cells, latents)
            rows.append({"model": model, "precision": precision} | found)
            print(json.dumps(rows[-1]), flush=True)
    import onnxruntime

    where = machine() | {"onnxruntime-openvino": onnxruntime.__version__, "threads": THREADS}
    path.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    title = f"{where['cpu']}, {THREADS} threads, onnxruntime-openvino {onnxruntime.__version__}."
    path.with_suffix(".md").write_text(f"{title}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
