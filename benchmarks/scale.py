"""What a scan of many shards costs, against the bare encoder in the same run.

    python benchmarks/scale.py                              # a few thousand images, some minutes
    python benchmarks/scale.py --images 1000000 --shards 100 --source http   # hours on two cores

Shards are made from the example latents (shards.py): of 24 x 24 cells (192 px), float16, 36,864
bytes an image, as that is the smallest grid that nano-flux2 does not bring up to a larger one.
`bare` encodes batches that lie in memory: once before the scans and once behind them. A scan's rate
is over the time from its first shard's begin to its last one's end, without loading the model or
starting Ray; `whole` has those, too. Memory is the proportional set size of the scan and of every
process below it, the largest seen. files: on this disk. s3: a server of this machine (moto, a
process of its own). http: a server that makes each shard when it is asked for, so that the whole
set never lies anywhere; it shares the cores with the scan.
Results go to benchmarks/results/scale.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from machine import machine
from shards import latents, shard, sizes

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODEL, POLICY = "nano-flux2", "family"
ENGINES = ("local", "ray")
SOURCES = ("files", "s3", "http")


# -- one contender, in a process of its own --------------------------------------------------


def bare(args: argparse.Namespace) -> dict[str, Any]:
    """The encoder on batches in memory, for as many images as a scan has, at most `bare_images`."""
    array = latents(args.batch, 0, args.cells)
    encode: Callable[[], Any]
    if args.runtime == "onnx":
        from latentguard.bundled import bundled_guard

        encode = partial(bundled_guard(POLICY, MODEL).embed, array.astype("float32"))
    else:
        import torch

        from latentguard import Latents, load_encoder

        batch = Latents(torch.from_numpy(array).float(), "flux2", scaled=True)
        encode = partial(load_encoder(MODEL).encode_latents, batch)
    encode()
    rounds = max(1, min(args.images, args.bare_images) // args.batch)
    begun = time.perf_counter()
    for _ in range(rounds):
        encode()
    return {"images": rounds * args.batch, "seconds": time.perf_counter() - begun}


def bare_rate(batch: int, runtime: str) -> float:
    """Images/s of the bare encoder, measured in a process of its own."""
    args = argparse.Namespace(
        images=2000, bare_images=2000, cells=24, batch=batch, scratch=".", actors=1, runtime=runtime
    )
    said = contender(args, "--work=bare")
    return float(said["images"] / said["seconds"])


def scan(args: argparse.Namespace) -> dict[str, Any]:
    """A run of an engine: what its manifest says it took."""
    from latentguard.files import Reading
    from latentguard.policy import load_policy
    from latentguard.scan.judges import default_lanes
    from latentguard.scan.judging import Judging
    from latentguard.scan.options import RunOptions
    from latentguard.scan.parts import collect
    from latentguard.scan.run import open_run
    from latentguard.scan.told import ToldJudges

    options = RunOptions(
        load_policy(POLICY),
        MODEL,
        runtime=args.runtime,
        views="whole" if args.runtime == "torch" else None,
        batch_size=args.batch,
        reading=Reading.of("flux2", True),
    )
    ray = args.engine == "ray"
    judges = ToldJudges(options) if ray else options.judges(lanes=default_lanes())
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        run = open_run(place, options, judges, args.paths)
        if args.engine == "ray":
            from latentguard.scan.ray_engine import Pool, run_ray

            run_ray(run, Judging(judges), Pool(actors=(1, args.actors)))
        else:
            from latentguard.scan.local import run_local
            from latentguard.scan.reader import default_workers

            run_local(run, Judging(judges), workers=default_workers())
        whole = time.perf_counter() - begun
        written = sum(entry.part.size for entry in run.done.values())
        total = collect([Path(place)]).tally
    images = sum(entry.outcomes.total() for entry in run.done.values())
    assert run.errors == 0, "every image must be scored"
    assert total.began is not None
    assert total.ended is not None
    return {
        "images": images,
        "seconds": (total.ended - total.began) / 1000,
        "whole": whole,
        "phases": {name: micro / 1e6 for name, micro in total.microseconds.items()},
        "read": total.bytes_read,
        "written": written,
    }


# -- who starts and watches them -------------------------------------------------------------


def contender(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What a contender says, and the most memory that it and its children had."""
    own = [f"--{name}={getattr(args, name)}" for name in ("images", "cells", "batch", "scratch")]
    own.append(f"--runtime={args.runtime}")
    own += [f"--actors={args.actors}", f"--bare-images={args.bare_images}"]
    command = [sys.executable, __file__, *own, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    most = [0]
    watching = threading.Thread(target=watch, args=(process, most), daemon=True)
    watching.start()
    said, _ = process.communicate()
    watching.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {**json.loads(said.splitlines()[-1]), "memory": most[0]}


def watch(process: subprocess.Popen[Any], most: list[int], every: float = 0.5) -> None:
    """Note the most memory that a process and those below it have, as long as it lives.

    Looking takes 20 ms or more: a long run is looked at less often.
    """
    while process.poll() is None:
        try:
            own = psutil.Process(process.pid)
            most[0] = max(most[0], sum(map(_held, [own, *own.children(recursive=True)])))
        except psutil.Error:
            pass
        time.sleep(every)


def _held(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


@contextmanager
def files(args: argparse.Namespace, shards: int) -> Iterator[list[str]]:
    """Shards on this disk."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for n, count in enumerate(sizes(args.images, shards)):
            (Path(folder) / f"{n:05d}.tar").write_bytes(shard(count, n, args.cells))
        yield [folder]


@contextmanager
def s3(args: argparse.Namespace, shards: int) -> Iterator[list[str]]:
    """Shards on a moto server, which holds them in memory."""
    import fsspec

    code = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '{}'])"
    port = _free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", code.format(port)], **quiet)
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    try:
        _wait_for(port)
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("bucket")
        for n, count in enumerate(sizes(args.images, shards)):
            fs.pipe_file(f"bucket/{n:05d}.tar", shard(count, n, args.cells))
        yield [f"s3://bucket/{n:05d}.tar" for n in range(shards)]
    finally:
        server.terminate()
        server.wait()


@contextmanager
def http(args: argparse.Namespace, shards: int) -> Iterator[list[str]]:
    """Shards that are made when they are asked for."""
    given = [f"--images={args.images}", f"--shards={shards}", f"--cells={args.cells}"]
    command = [sys.executable, str(HERE / "shards.py"), *given]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        yield [f"http://127.0.0.1:{port}/{n:05d}.tar" for n in range(shards)]
    finally:
        server.terminate()
        server.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(port: int) -> None:
    import socket

    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the S3 server does not answer")


# -- results ---------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    before = contender(args, "--work=bare")
    rows = []
    for source in args.source:
        for shards in args.shards:
            with {"files": files, "s3": s3, "http": http}[source](args, shards) as paths:
                for engine in args.engine:
                    said = contender(args, "--work=scan", "--engine", engine, "--paths", *paths)
                    rows.append({"source": source, "shards": shards, "engine": engine, **said})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    behind = contender(args, "--work=bare")
    rates = [said["images"] / said["seconds"] for said in (before, behind)]
    return {
        "machine": {**machine(), "ray": version("ray"), "latentguard": version("latentguard")},
        "settings": {k: getattr(args, k) for k in ("images", "cells", "batch", "actors", "runtime")}
        | {"model": MODEL, "policy": POLICY, "bytes_per_image": args.cells**2 * 32 * 2},
        "bare": {"before": before, "behind": behind, "rate": sum(rates) / 2},
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    on, said, plain = result["machine"], result["settings"], result["bare"]["rate"]
    rates = [b["images"] / b["seconds"] for k, b in result["bare"].items() if k != "rate"]
    lines = [
        "# Scans of many shards",
        "",
        f"{on['cpu']}, {on['cores']} cores, no GPU; torch {on['torch']}, Ray {on['ray']}. "
        f"{said['images']:,} images of {said['cells']} x {said['cells']} cells, float16, "
        f"{said['bytes_per_image']:,} bytes each, {said['model']}, policy {said['policy']}, "
        f"batches of {said['batch']}, the {said['runtime']} runtime.",
        "",
        f"The bare encoder: {rates[0]:.1f} images/s before, {rates[1]:.1f} behind.",
        "",
        "| source | shards | engine | images/s | of the bare encoder | whole s | reading s "
        "| scoring s | peak MB | written bytes an image |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        rate, phases = row["images"] / row["seconds"], row["phases"]
        reading = sum(seconds for name, seconds in phases.items() if name != "score")
        lines.append(
            f"| {row['source']} | {row['shards']} | {row['engine']} | {rate:.1f} "
            f"| {rate / plain:.2f} | {row['whole']:.1f} | {reading:.1f} | {phases['score']:.1f} "
            f"| {row['memory'] / 1e6:,.0f} | {row['written'] / row['images']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=["files", "s3"])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--cells", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runtime", choices=["torch", "onnx"], default="torch")
    parser.add_argument("--actors", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bare-images", type=int, default=2000)
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="for shards and runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale")
    parser.add_argument("--work", choices=["bare", "scan"], help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        args.engine = args.engine[0] if isinstance(args.engine, list) else args.engine
        # Neither somebody else's cluster, nor a word about this one.
        os.environ |= {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
        print(json.dumps({"bare": bare, "scan": scan}[args.work](args)))
        return
    result = measure(args)
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
