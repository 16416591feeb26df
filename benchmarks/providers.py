"""Exported guards on the CPU and on OpenVINO's provider, alone and beside a process that computes.

    python benchmarks/providers.py LATENTS... --exports DIR

Needs onnxruntime-openvino in place of onnxruntime, and no torch. DIR is what `runtime.py export`
wrote. All ways to run a file are guards in one process and take turns, so that ratios hold where
the machine's speed changes; times are medians over all turns. LATENTS, real ones of FLUX.2, tell
whether nano-flux2 decides as on the CPU provider; Latent-CLIP reads noise, and embeddings are
compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
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

CPU = ["CPUExecutionProvider"]
OPENVINO = {"device_type": "CPU", "num_of_threads": str(THREADS)}
WAYS: dict[str, dict[str, Any]] = {
    "CPU": {"providers": CPU, "threads": THREADS},
    "CPU, no spinning": {"providers": CPU, "threads": THREADS, "spin": False},
    "CPU, one thread": {"providers": CPU, "threads": 1},
    "OpenVINO": {"providers": [("OpenVINOExecutionProvider", OPENVINO)]},
}
BATCHED = ("CPU", "OpenVINO")
PRECISIONS = ("fp32", "int8")
TURNS = 5
EMBEDDED = 64


def measure(path: Path, model: str, cells: int, latents: NDArray[np.float32]) -> list[Any]:
    """A row for each way to run a file."""
    guards = {name: Guard(path, **way) for name, way in WAYS.items()}
    calls = 2 if "b4" in model else 8
    one, many = arrays(model, 1, cells), arrays(model, 16, cells)
    alone = take_turns(guards, one, TURNS, calls)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = take_turns(guards, one, TURNS, calls)
    finally:
        busy.kill()
        busy.wait()
    batched = take_turns({name: guards[name] for name in BATCHED}, many, 1, 1)
    return [
        {
            "way": name,
            "ms": statistics.median(alone[name]),
            "best": min(alone[name]),
            "beside": statistics.median(beside[name]),
            "batch16": statistics.median(batched[name]) / 16 if name in batched else None,
        }
        | (agreement(guards["CPU"], guards[name], latents) if name == "OpenVINO" else {})
        for name in guards
    ]


def take_turns(
    guards: dict[str, Guard], array: NDArray[np.float32], turns: int, calls: int
) -> dict[str, list[float]]:
    """Milliseconds of each call, but the first of each turn."""
    times: dict[str, list[float]] = {name: [] for name in guards}
    for _ in range(turns):
        for name, guard in guards.items():
            guard.scores(array)
            for _ in range(calls):
                start = time.perf_counter()
                guard.scores(array)
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def agreement(guard: Guard, other: Guard, latents: NDArray[np.float32]) -> dict[str, Any]:
    """How far another guard's verdicts are from a guard's, and its first embeddings."""
    embedded = [each.embed(latents[:EMBEDDED]) for each in (guard, other)]
    verdicts = [each.scan(latents) for each in (guard, other)]
    margins = [np.array([[s.margin for s in one.concepts] for one in all_]) for all_ in verdicts]
    pairs = list(zip(*verdicts, strict=True))
    return {
        "latents": len(latents),
        "margin_max": float(np.abs(margins[0] - margins[1]).max()),
        "cosine_min": float((embedded[0] * embedded[1]).sum(1).min()),
        "same_decision": float(np.mean([a.decision == b.decision for a, b in pairs])),
    }


def judged(files: Sequence[Path]) -> NDArray[np.float32]:
    """All latents but those that int8 was calibrated on, [N, C, H, W]."""
    found = [record.latents for record in read_arrays(files, "flux2", True)]
    kept = [one for place, one in enumerate(found) if place % CALIBRATION and one is not None]
    return np.concatenate([one.to_standard().array for one in kept]).astype(np.float32)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | precision | run on | ms, batch 1 (best) | beside a busy process | ms an image, "
        "batch 16 | margins differ by at most | smallest cosine | same decision |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in rows:
        cells = [one["model"], one["precision"], one["way"]]
        cells += [f"{one['ms']:.1f} ({one['best']:.1f})", f"{one['beside']:.1f}"]
        cells.append("-" if one["batch16"] is None else f"{one['batch16']:.1f}")
        if "latents" in one:
            cells += [f"{one['margin_max']:.2g}", f"{one['cosine_min']:.6f}"]
            share = f"{100 * one['same_decision']:.2f} % of {one['latents']:,}"
            cells.append(share if one["model"] == NANO else "-")
        else:
            cells += ["-", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("latents", type=Path, nargs="+")
    parser.add_argument("--exports", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(NANO, *CLIPS), default=[NANO, *CLIPS])
    arguments = parser.parse_args()
    path = RESULTS / "providers.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [one for one in before if one["model"] not in arguments.only]
    for model in arguments.only:
        cells = 32 if model == NANO else 64
        latents = judged(arguments.latents) if model == NANO else arrays(model, 4, cells)
        for precision in PRECISIONS:
            file = exported(arguments.exports, model, precision, cells)
            for one in measure(file, model, cells, latents):
                rows.append({"model": model, "precision": precision} | one)
                print(json.dumps(rows[-1]), flush=True)
    where = machine() | {"onnxruntime-openvino": onnxruntime.__version__, "threads": THREADS}
    path.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    title = f"{where['cpu']}, {THREADS} threads, onnxruntime-openvino {onnxruntime.__version__}."
    path.with_suffix(".md").write_text(f"{title}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
