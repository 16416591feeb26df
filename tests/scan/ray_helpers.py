"""Runs on Ray clusters of this machine, and what dies of them, for the tests of the Ray engine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_helpers import records_of

from latentguard.errors import MissingExtraError
from latentguard.scan.judging import Judging
from latentguard.scan.options import RunOptions
from latentguard.scan.ray_engine import need_ray, run_ray
from latentguard.scan.run import Run, open_run

try:
    need_ray()
    HAS_RAY = True
except MissingExtraError:
    HAS_RAY = False
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs Ray: pip install 'latentguard[ray]'")

_STORE = {"object_store_memory": 100 << 20}


def on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never somebody else's cluster, and no word about this one to anybody."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A head that works on nothing, and two nodes with room for one actor each."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, **_STORE}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            add_node(made)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def add_node(cluster: Any) -> None:
    cluster.add_node(num_cpus=1, **_STORE)


def ray_run(
    place: Path | str, options: RunOptions, paths: Sequence[Path], resume: bool = False, **how: Any
) -> Run:
    """A run to its end."""
    judges = options.judges()
    run = open_run(str(place), options, judges, [str(p) for p in paths], resume=resume)
    run_ray(run, Judging(judges), **how)
    return run


def assert_same(run: Run, whole: Run) -> None:
    """Each record once, in its place, to the bit; and no file more than that takes."""
    assert records_of(run) == records_of(whole)
    assert {n: entry.part for n, entry in run.done.items()} == {
        n: entry.part for n, entry in whole.done.items()
    }
    assert _files(Path(run.place)) == _files(Path(whole.place))


def _files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


# -- processes -------------------------------------------------------------------------------


def actors(below: int | None = None) -> list[psutil.Process]:
    """The actors that descend from a process, this one unless another is named."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(below).children(recursive=True)
        return [process for process in found if "_Scanner" in _title(process)]
    return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_an_actor() -> int:
    """Kill one; where none is up, wait for one, as Ray brings them back."""
    while True:
        for actor in actors():
            with suppress(psutil.Error):
                actor.kill()
                return actor.pid
        time.sleep(0.02)


def started(run: Path, shards: Sequence[Path], policy: Path) -> subprocess.Popen[bytes]:
    """The command at work: it begins a run, or goes on with one."""
    code = "import sys; from latentguard.cli import main; sys.exit(main())"
    given = ["scan", *map(str, shards), "--run", str(run), "--policy", str(policy), "--resume"]
    command = [sys.executable, "-c", code, *given, "--batch-size", "2", "--engine", "ray"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(driver: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """Wait until something is so, or the driver has ended."""
    while driver.poll() is None and not ready():
        time.sleep(0.005)


def kill_driver(driver: subprocess.Popen[bytes], working: Sequence[psutil.Process]) -> None:
    """Kill a driver. Its actors, whom nobody asks any more, end by themselves."""
    driver.kill()
    driver.wait()
    psutil.wait_procs(working)
