"""A million latents, scanned in as many sittings as it takes.

    python benchmarks/million.py --run runs/million                # until it is done
    python benchmarks/million.py --run runs/million --minutes 30   # a sitting, ended by SIGKILL
    python benchmarks/million.py --run runs/million --bare         # and the bare encoder with it
    python benchmarks/million.py --run runs/rest --first 58        # shards 58 to 99 alone

Each sitting is `latentguard scan ADDRESSES --run RUN --resume`, as anybody types it, over 100
shards of 10,000 latents that a server of this machine makes when they are asked for (shards.py). A
sitting that ends early is killed, not stopped: the shard at hand is lost, and scanned anew in the
next.
Each leaves a line in RUN.sittings.jsonl: images, seconds from its first shard's begin to its last
one's end, peak memory of the scan and all processes below it, the machine's load. `--bare`
measures the encoder alone before and behind the sitting; a share of it stands in the table only for
such sittings. Results go to benchmarks/results/million.{json,md} once all shards are done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from machine import machine
from scale import MODEL, POLICY, RESULTS, bare_rate, watch
from shards import sizes

HERE = Path(__file__).parent


def sitting(args: argparse.Namespace) -> dict[str, Any]:
    """One sitting: what it took."""
    from latentguard.scan.parts import collect

    done = set(entries(args.run))
    server = subprocess.Popen(
        [
            *(sys.executable, str(HERE / "shards.py"), f"--port={args.port}"),
            *(f"--images={args.images}", f"--shards={args.shards}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    most, load = [0], psutil.getloadavg()[1]
    try:
        server.stdout.readline()
        command = [str(Path(sys.executable).with_name("latentguard")), "scan"]
        command += [f"--run={args.run}", "--resume"]
        command += [f"--policy={POLICY}", f"--model={MODEL}", "--space=flux2", "--scaled"]
        command += [
            f"--runtime={args.runtime}",
            "--progress=none",
            "--quiet",
            f"--batch-size={args.batch}",
            "--fail-on=never",
        ]
        command += [f"http://127.0.0.1:{args.port}/{{{args.first:05d}..{args.shards - 1:05d}}}.tar"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        looker = threading.Thread(target=watch, args=(process, most, 3.0), daemon=True)
        looker.start()
        try:
            process.wait(timeout=args.minutes * 60 if args.minutes else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        looker.join()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"the scan ended with {process.returncode}")
    finally:
        server.terminate()
        server.wait()
    new = {name: entry for name, entry in entries(args.run).items() if name not in done}
    tallies = [collect([args.run / entry["tally"]["name"]]).tally for entry in new.values()]
    began = min((t.began for t in tallies if t.began is not None), default=0)
    ended = max((t.ended for t in tallies if t.ended is not None), default=0)
    return {
        "shards": len(new),
        "images": sum(entry["images"] for entry in new.values()),
        "errors": sum(entry["outcomes"].get("error", 0) for entry in new.values()),
        "seconds": (ended - began) / 1000,
        "memory": most[0],
        "load": [load, psutil.getloadavg()[1]],
        "killed": process.returncode == -signal.SIGKILL,
    }


def entries(run: Path) -> dict[str, dict[str, Any]]:
    """The shards of a run that are done."""
    found = sorted((run / "manifest").glob("*.json"))
    return {path.name: json.loads(path.read_bytes()) for path in found}


def table(on: dict[str, Any], args: argparse.Namespace, said: list[dict[str, Any]]) -> str:
    done = entries(args.run)
    images = sum(entry["images"] for entry in done.values())
    errors = sum(entry["outcomes"].get("error", 0) for entry in done.values())
    lines = [
        "# A million latents",
        "",
        f"{on['cpu']}, {on['cores']} cores, no GPU; torch {on['torch']}. {len(done)} shards, from "
        f"number {args.first} of {args.shards} on, of "
        f"{args.images // args.shards:,} latents of 24 x 24 cells, {MODEL}, policy {POLICY}, "
        f"batches of {args.batch}, the {args.runtime} runtime. {images:,} images are in the run, "
        f"each once; {errors} could not be read.",
        "",
        "| sitting | shards | images/s | of the bare encoder | peak MB | load before, behind "
        "| ended |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for n, one in enumerate(said, start=1):
        rate = one["images"] / one["seconds"] if one["seconds"] else 0.0
        bare = one.get("bare")
        share = f"{rate / (sum(bare) / len(bare)):.2f}" if bare and rate else ""
        end = "killed" if one["killed"] else "done"
        lines.append(
            f"| {n} | {one['shards']} | {rate:.1f} | {share} | {one['memory'] / 1e6:,.0f} | "
            f"{one['load'][0]:.1f}, {one['load'][1]:.1f} | {end} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="Folder of the run.")
    parser.add_argument("--minutes", type=float, help="Kill this sitting after so many.")
    parser.add_argument("--bare", action="store_true", help="Measure the bare encoder, too.")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="Begin with the shard of this number.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runtime", choices=["torch", "onnx"], default="torch")
    parser.add_argument("--port", type=int, default=18_123)
    args = parser.parse_args()
    assert args.images == sum(sizes(args.images, args.shards))
    log = args.run.with_name(f"{args.run.name}.sittings.jsonl")
    before = bare_rate(args.batch, args.runtime) if args.bare else None
    begun = time.perf_counter()
    said = sitting(args)
    if before is not None:
        said["bare"] = [before, bare_rate(args.batch, args.runtime)]
    said["whole"] = time.perf_counter() - begun
    with log.open("a") as file:
        file.write(json.dumps(said) + "\n")
    sittings = [json.loads(line) for line in log.read_text().splitlines()]
    page = table(machine(), args, sittings)
    print(page)
    if len(entries(args.run)) == args.shards - args.first:
        result = {
            "machine": machine(),
            "settings": vars(args) | {"run": None},
            "sittings": sittings,
        }
        (RESULTS / "million.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "million.md").write_text(page)


if __name__ == "__main__":
    main()
