"""Load on the example services over loopback, every answer checked.

The service runs in processes of its own, with one thread of ONNX Runtime; the clients, threads of
this process with a connection each, send real latents in a closed loop: the next request when the
last is answered. Each request must get exactly one answer: the verdicts that the guard gives in
this process, or an explicit 503. An answer that is neither is counted as wrong, a request without
one as dropped, and the script then fails.

Usage: python benchmarks/serve.py [--app fastapi | ray] [--guard guard.onnx]
    [--latents latents.pt] [--seconds 10]
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from latentguard.files import load_latents
from latentguard.runtime import Guard

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples" / "serve"
SAID = "space=flux2&scaled=true"


@dataclass(frozen=True)
class App:
    """A service: its script, its path, and the path and status by which it is known to be ready.
    counts: it tells how it answered. refuses: what the body of its 503 must hold."""

    title: str
    script: str
    path: str
    ready: tuple[str, int]
    counts: bool
    refuses: bytes


APPS = {
    "fastapi": App(
        "The FastAPI example", "app.py", "/v1/verdicts", ("/readyz", 200), True, b'"block"'
    ),
    # Ray's own proxy refuses, before the application sees a request.
    "ray": App("The Ray Serve example", "ray_app.py", "/", ("/", 405), False, b"dropped"),
}


@dataclass(frozen=True)
class Scenario:
    """connections: clients at a time. images: of a request. max_requests: that the service lets in.
    new: a new connection for each request."""

    name: str
    connections: int
    images: int = 1
    max_requests: int = 64
    new: bool = False


SCENARIOS = (
    Scenario("one client", 1),
    Scenario("8 clients", 8),
    Scenario("32 clients", 32),
    Scenario("2 clients, 16 images a request", 2, images=16),
    Scenario("overload: 64 clients, 8 let in", 64, max_requests=8),
    Scenario("overload, a connection a request", 64, max_requests=8, new=True),
)


@dataclass
class Seen:
    """What the clients saw."""

    sent: int = 0
    dropped: int = 0
    wrong: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    judged: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Request:
    """A body, and the decision and matches that each of its images must get."""

    body: bytes
    expected: list[tuple[str, list[str]]]


def requests(guard: Guard, latents: Any, images: int) -> list[Request]:
    """Requests of `images` images each; every image is in one of them, or in two."""
    found = []
    for start in range(0, len(latents), max(1, images // 2)):
        batch = np.take(latents, range(start, start + images), axis=0, mode="wrap")
        stream = io.BytesIO()
        np.save(stream, batch)
        expected = [(v.decision, [c.id for c in v.matched]) for v in guard.scan(batch)]
        found.append(Request(stream.getvalue(), expected))
    return found


@contextmanager
def service(app: App, guard: Path, *options: str) -> Iterator[tuple[int, int]]:
    """The service on a free port, ready: its port and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(EXAMPLES / app.script)
    command = [sys.executable, script, str(guard), "--port", str(port), "--threads", "1"]
    process = subprocess.Popen([*command, *options])
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit("the service did not start")
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", app.ready[0])
                if connection.getresponse().status == app.ready[1]:
                    break
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def client(
    app: App, port: int, scenario: Scenario, work: Iterator[Request], until: float, seen: Seen
) -> None:
    """One client. Its requests are under way one at a time, so `seen` needs no lock but the GIL."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.perf_counter() < until:
        request = next(work)
        if scenario.new:
            connection.close()
        seen.sent += 1
        began = time.perf_counter()
        try:
            connection.request("POST", f"{app.path}?{SAID}", request.body)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            seen.dropped += 1
            seen.notes[f"{type(error).__name__}: {error}"] += 1
            connection.close()
            continue
        took = 1e3 * (time.perf_counter() - began)
        seen.statuses[status] += 1
        if not right(app, status, text, request):
            seen.wrong += 1
            seen.notes[f"{status} {text[:80]!r}"] += 1
        (seen.judged if status == 200 else seen.refused).append(took)
    connection.close()


def right(app: App, status: int, text: bytes, request: Request) -> bool:
    """Whether an answer is the verdicts of its request, or an explicit refusal."""
    if status != 200:
        return status == 503 and app.refuses in text
    said = json.loads(text)
    found = [
        (verdict["decision"], [c["id"] for c in verdict["concepts"] if c["matched"]])
        for verdict in said.get("verdicts", [])
    ]
    return found == request.expected


def run(
    app: App, guard: Path, pool: list[Request], scenario: Scenario, seconds: float
) -> dict[str, Any]:
    """One scenario on a service of its own."""
    with service(app, guard, "--max-requests", str(scenario.max_requests)) as (port, process):
        each = [Seen() for _ in range(scenario.connections)]
        offsets = itertools.count()
        threads = []
        began = time.perf_counter()
        for seen in each:
            skip = next(offsets) * 7 % len(pool)
            work = itertools.islice(itertools.cycle(pool), skip, None)
            arguments = (app, port, scenario, work, began + seconds, seen)
            threads.append(threading.Thread(target=client, args=arguments))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        memory = psutil.Process(process).memory_info().rss
        counted = metrics(port) if app.counts else None
    judged = sorted(ms for seen in each for ms in seen.judged)
    refused = sorted(ms for seen in each for ms in seen.refused)
    statuses = sum((seen.statuses for seen in each), Counter[int]())
    sent = sum(seen.sent for seen in each)
    # Both sides counted the same: nothing was answered twice, or judged and not delivered.
    agrees = counted is None or counted == dict(statuses)
    return {
        "scenario": scenario.name,
        "sent": sent,
        "verdicts": statuses[200],
        "refused": statuses[503],
        "dropped": sum(seen.dropped for seen in each),
        "wrong": sum(seen.wrong for seen in each)
        + sent
        - sum(statuses.values())
        - sum(seen.dropped for seen in each),
        "service_agrees": agrees,
        "images_a_second": round(statuses[200] * scenario.images / took, 1),
        "answers_a_second": round(sum(statuses.values()) / took, 1),
        "p50_ms": percentile(judged, 50),
        "p99_ms": percentile(judged, 99),
        "refused_p50_ms": percentile(refused, 50),
        "refused_p99_ms": percentile(refused, 99),
        "service_mb": round(memory / 2**20) if app.counts else None,
        "notes": dict(sum((seen.notes for seen in each), Counter[str]()).most_common(5)),
    }


def metrics(port: int) -> dict[int, int]:
    """The answers that the service counted, by status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    found = {}
    for line in connection.getresponse().read().decode().splitlines():
        if line.startswith("latentguard_answers_total{"):
            name, count = line.split()
            found[int(name.split('"')[1])] = int(float(count))
    return found


def percentile(values: list[float], q: int) -> float | None:
    """In milliseconds; None where there is nothing."""
    if len(values) < 2:
        return None
    return round(statistics.quantiles(values, n=100, method="inclusive")[q - 1], 1)


def alone(guard: Guard, pool: list[Request]) -> float:
    """Milliseconds of `Guard.scan` on one image, in this process: what HTTP is compared with."""
    images = [np.load(io.BytesIO(request.body)) for request in pool]
    for image in images[:5]:
        guard.scan(image)
    times = []
    for image in images:
        began = time.perf_counter()
        guard.scan(image)
        times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 1)


def wrk(app: App, guard: Path, pool: list[Request], folder: Path, seconds: float) -> str | None:
    """What wrk measures with 8 connections, where it is installed."""
    program = shutil.which("wrk")
    if program is None:
        return None
    body, script = folder / "body.npy", folder / "post.lua"
    body.write_bytes(pool[0].body)
    script.write_text(
        f'wrk.method = "POST"\nlocal file = io.open("{body}", "rb")\nwrk.body = file:read("*a")\n'
    )
    with service(app, guard) as (port, _):
        command = [program, "-t1", "-c8", f"-d{round(seconds)}s", "--latency", "-s", str(script)]
        url = f"http://127.0.0.1:{port}{app.path}?{SAID}"
        ran = subprocess.run([*command, url], capture_output=True, text=True, check=True)
    return ran.stdout.strip().replace(f":{port}", "")


def table(app: App, results: dict[str, Any]) -> str:
    """The results as Markdown."""
    columns = {
        "": "scenario",
        "requests": "sent",
        "verdicts": "verdicts",
        "503": "refused",
        "dropped": "dropped",
        "wrong": "wrong",
        "images/s": "images_a_second",
        "p50 ms": "p50_ms",
        "p99 ms": "p99_ms",
        "p50 ms of a 503": "refused_p50_ms",
        "p99 ms of a 503": "refused_p99_ms",
    }
    if app.counts:
        columns["service MB"] = "service_mb"
    lines = [
        f"## {app.title}",
        "",
        f"{results['machine']}, one thread of ONNX Runtime for the service; its Python and the "
        f"clients share what is left. {results['latents']} real latents, {results['model']} under "
        f"the policy `{results['policy']}`; `Guard.scan` on one image takes "
        f"{results['scan_ms']} ms by itself.",
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
    ]
    for row in results["scenarios"]:
        cells = [
            "" if row[key] is None else f"{row[key]:,}" if isinstance(row[key], int) else row[key]
            for key in columns.values()
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if results["wrk"]:
        lines += ["", "The same by wrk, with one image:", "", "```", results["wrk"], "```"]
    return "\n".join([*lines, ""])


HEAD = """# The example services under load

`python benchmarks/serve.py`, over loopback. Clients work in a closed loop, a request each at a
time. Every answer was read and compared: 200 with the decision and the matches that the guard
gives in the benchmark's own process, or an explicit 503. `dropped` are requests without an answer,
`wrong` are answers that are neither; the counts of the FastAPI example's `/metrics` are the same as
the clients'. Under overload the clients ask again at once, without the pause that `Retry-After`
asks for.
"""


def main() -> None:
    """Measure, write results/serve.*; fail where a request was dropped or an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--app", choices=APPS, default="fastapi")
    parser.add_argument("--guard", type=Path, help="an exported file for the latents' size")
    parser.add_argument("--latents", type=Path, default=HERE.parent / "examples" / "latents.pt")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each scenario")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="scenarios")
    given = parser.parse_args()
    app = APPS[given.app]
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in given.only]
    with tempfile.TemporaryDirectory() as folder:
        path = given.guard or Path(folder, "guard.onnx")
        latents = load_latents(given.latents).tensor.numpy()
        if given.guard is None:
            from latentguard.export import export_onnx

            export_onnx("family", "nano-flux2", path, size=latents.shape[2:])
        with Guard(path, threads=1) as guard:
            pools = {n: requests(guard, latents, n) for n in {1, *(s.images for s in scenarios)}}
            results: dict[str, Any] = {
                "machine": f"{cpu()}, {psutil.cpu_count()} cores",
                "latents": len(latents),
                "model": guard.model[0],
                "policy": guard.policy["name"],
                "scan_ms": alone(guard, pools[1]),
            }
        results["scenarios"] = [
            run(app, path, pools[scenario.images], scenario, given.seconds)
            for scenario in scenarios
        ]
        results["wrk"] = wrk(app, path, pools[1], Path(folder), given.seconds)
    print(table(app, results))
    file = HERE / "results" / "serve.json"
    every = json.loads(file.read_text()) if file.exists() else {}
    every[given.app] = results
    file.write_text(json.dumps(every, indent=1) + "\n")
    tables = [table(APPS[name], every[name]) for name in APPS if name in every]
    file.with_suffix(".md").write_text("\n".join([HEAD, *tables]))
    bad = [
        row
        for row in results["scenarios"]
        if row["dropped"] or row["wrong"] or not row["service_agrees"]
    ]
    if bad:
        sys.exit(json.dumps(bad, indent=1))


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
