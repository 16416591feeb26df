"""What it takes until the first verdict, and what a process then holds: with torch and without.

Every contender runs in a process of its own; figures are medians of `--repeat` processes, on the
latents in examples/. Usage: python benchmarks/startup.py [--repeat 5] [--export guard.onnx]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
LATENTS = ROOT / "examples" / "latents.pt"

# Each prints seconds by step, then the resident set in MB at the end and at its peak.
MEASURE = """
import json, resource, sys, time
began = last = time.perf_counter()
steps = {}
def step(name):
    global last
    now = time.perf_counter()
    steps[name] = now - last
    last = now
BODY
pages = int(open("/proc/self/statm").read().split()[1])
steps["resident"] = pages * resource.getpagesize() / 1e6
steps["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps(steps))
"""
RUNTIME = """
from latentguard.runtime import Guard
step("import")
from latentguard.files import read_arrays
record = next(read_arrays(sys.argv[2]))
step("read")
guard = Guard(sys.argv[1])
step("load")
guard.scan(record.latents.array)
step("first verdict")
guard.scan(record.latents.array)
step("second verdict")
"""
TORCH = """
import torch
from latentguard import Scorer
step("import")
from latentguard.files import read_latents
record = next(read_latents(sys.argv[2]))
step("read")
scorer = Scorer("family", "nano-flux2", device="cpu")
step("load")
scorer.verdicts(record.latents)
step("first verdict")
scorer.verdicts(record.latents)
step("second verdict")
"""
CONTENDERS = {"latentguard.runtime (no torch)": RUNTIME, "Scorer (torch)": TORCH}
TIMES = ("import", "read", "load", "first verdict", "second verdict")


def measure(body: str, export: Path, repeat: int) -> dict[str, float]:
    """Medians over processes; the first one, which fills the file cache, is left out."""
    runs = []
    for _ in range(repeat + 1):
        code = MEASURE.replace("BODY", body)
        command = [sys.executable, "-c", code, str(export), str(LATENTS)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        runs.append(json.loads(ran.stdout.splitlines()[-1]))
    return {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "| | " + " | ".join(f"{name}, ms" for name in TIMES) + " | resident, MB | peak, MB |",
        "| --- |" + " ---: |" * (len(TIMES) + 2),
    ]
    for name, found in results.items():
        times = " | ".join(f"{1e3 * found[key]:,.0f}" for key in TIMES)
        lines.append(f"| {name} | {times} | {found['resident']:,.0f} | {found['peak']:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--export", type=Path, help="nano-flux2 with the policy family")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export = arguments.export
        if export is None:
            from latentguard.export import export_onnx

            export = Path(folder, "guard.onnx")
            export_onnx("family", "nano-flux2", export, size=(32, 32))
        results = {
            name: measure(body, export.resolve(), arguments.repeat)
            for name, body in CONTENDERS.items()
        }
    RESULTS.mkdir(exist_ok=True)
    facts = {
        "machine": platform.processor() or platform.machine(),
        "python": sys.version.split()[0],
    }
    stored = {**facts, "results": results}
    (RESULTS / "startup.json").write_text(json.dumps(stored, indent=1) + "\n")
    text = (
        "# Until the first verdict\n\n"
        "nano-flux2 under the policy `family`, one image of 256 px; medians of "
        f"{arguments.repeat} processes, files cached. `python benchmarks/startup.py`\n\n"
    )
    (RESULTS / "startup.md").write_text(text + table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
