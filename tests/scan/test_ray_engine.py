"""The Ray engine gives what the local one gives, whatever dies meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_helpers import (
    HAS_RAY,
    actors,
    assert_same,
    kill_an_actor,
    kill_driver,
    needs_ray,
    on_its_own,
    ray_run,
    started,
    two_nodes,
    wait_for,
)
from run_helpers import options_of, records_of, scan_run, write_shard, write_shards

from latentguard.errors import MissingExtraError, TooManyErrorsError, UsageError
from latentguard.scan.entry import Entry
from latentguard.scan.options import RunOptions
from latentguard.scan.ray_engine import Pool, need_ray

pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


@pytest.fixture(autouse=True)
def _own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    on_its_own(monkeypatch)


@pytest.fixture
def cluster(_own_cluster: None) -> Iterator[Any]:
    with two_nodes() as made:
        yield made


@pytest.mark.slow
@needs_ray
def test_both_engines_say_the_same(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 4, 5)
    bad = tmp_path / "shards" / "bad.tar"
    bad.write_bytes(b"nothing of a tar" * 100)
    options = options_of(calm, batch_size=2)
    noted: list[int] = []
    pool = Pool(actors=(1, 2))
    run = ray_run(
        tmp_path / "run", options, [*shards, bad], pool=pool, noted=lambda e: noted.append(e.number)
    )
    assert_same(run, scan_run(tmp_path / "whole", options, [*shards, bad]))
    assert sorted(noted) == list(range(5))
    import ray

    assert not ray.is_initialized()  # what was started for this is stopped
    assert ray_run(tmp_path / "run", options, [], resume=True).pending() == []


@needs_ray
@pytest.mark.slow
def test_an_exported_file_judges_the_same_in_both_engines(tmp_path: Path, calm: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the runtime needs the onnx extra")
    pytest.importorskip("onnx", reason="exporting needs the onnx extra")
    from latentguard.export import export_onnx

    file = tmp_path / "guard.onnx"
    export_onnx(calm, "nano-flux2", file, size=(16, 16))
    shards = write_shards(tmp_path / "shards", 3, 5)
    options = RunOptions(model=str(file), runtime="onnx", batch_size=2)
    run = ray_run(tmp_path / "run", options, shards, pool=Pool(actors=(1, 2)))
    whole = scan_run(tmp_path / "whole", options, shards, workers=1)
    assert_same(run, whole)
    assert {entry.models["flux2"] for entry in run.done.values()} == {
        tuple(options.judges().models[0].id)
    }
    assert len(records_of(run)) == 15
    assert run.errors == 0


@needs_ray
@pytest.mark.slow
def test_a_node_that_dies_in_the_middle(tmp_path: Path, calm: Path, cluster: Any) -> None:
    shards = write_shards(tmp_path / "shards", 8, 40)
    options = options_of(calm, batch_size=2)
    nodes = list(cluster.worker_nodes)

    def noted(entry: Entry) -> None:
        if nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.clear()

    run = ray_run(tmp_path / "run", options, shards, noted=noted)
    assert not nodes
    assert_same(run, scan_run(tmp_path / "whole", options, shards))


@needs_ray
@pytest.mark.slow
def test_actors_that_are_killed_lose_nothing(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 8, 40)
    options = options_of(calm, batch_size=2)
    killed: list[int] = []

    def noted(entry: Entry) -> None:
        if len(killed) < 2:
            killed.append(kill_an_actor())

    run = ray_run(tmp_path / "run", options, shards, pool=Pool(actors=(2, 2)), noted=noted)
    assert len(killed) == 2
    assert_same(run, scan_run(tmp_path / "whole", options, shards))


class _Poison:
    """Kills every actor that opens a file, as a file does of which each one runs out of memory."""

    def __init__(self, file: Path) -> None:
        self._file, self._over, self.killed = str(file), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.is_set():
            for actor in actors():
                try:
                    if any(file.path == self._file for file in actor.open_files()):
                        actor.kill()
                        self.killed += 1
                except psutil.Error:
                    continue
            time.sleep(0.05)

    def __enter__(self) -> _Poison:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@needs_ray
@pytest.mark.slow
def test_a_shard_that_kills_its_actors_is_given_up(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 4, 10)
    write_shard(shards[1], 200, 1)  # open for some seconds
    options = options_of(calm, batch_size=2)
    with _Poison(shards[1]) as poison:
        run = ray_run(tmp_path / "run", options, shards, pool=Pool(actors=(1, 1)))
    assert poison.killed >= 3
    (record,) = [row for row in records_of(run) if row["source"].startswith(str(shards[1]))]
    assert record["decision"] == "block"
    assert record["error"] == "3 processes that scanned only this shard died"
    whole = scan_run(tmp_path / "whole", options, shards)
    others = [row for row in records_of(whole) if not row["source"].startswith(str(shards[1]))]
    assert [row for row in records_of(run) if row != record] == others
    # Nothing says what it was, so it is tried again.
    assert_same(ray_run(tmp_path / "run", options, shards, resume=True), whole)


@needs_ray
@pytest.mark.slow
def test_a_driver_that_is_killed_loses_nothing(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 12, 40)
    run = tmp_path / "run"
    driver = started(run, shards, calm)
    wait_for(driver, lambda: any(run.glob("manifest/*.json")))
    kill_driver(driver, actors(driver.pid))
    assert any(run.glob("manifest/*.json"))
    options = options_of(calm, batch_size=2)
    again = ray_run(run, options, shards, resume=True)
    assert_same(again, scan_run(tmp_path / "whole", options, shards))


@needs_ray
@pytest.mark.slow
def test_what_ends_a_run_on_a_node_ends_it_here(
    tmp_path: Path, calm: Path, policy: Callable[..., Path]
) -> None:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        bad = write_shards(tmp_path / "shards", 4, 1)
        for path in bad:
            path.write_bytes(b"no tar" * 100)
        options = options_of(calm)
        with pytest.raises(TooManyErrorsError, match="images or files could not be read"):
            ray_run(tmp_path / "run", options, bad, max_errors=1)
        with pytest.raises(UsageError, match="too few for an actor with 2 and 0"):
            ray_run(tmp_path / "wide", options, bad, pool=Pool(cpus=2))
        # A store that takes nothing: its folder for parts is a file.
        place = tmp_path / "full"
        place.mkdir()
        (place / "parts").write_text("")
        with pytest.raises((OSError, UsageError)):
            ray_run(place, options, bad)
    finally:
        ray.shutdown()


@needs_ray
def test_no_cluster_at_an_address(
    tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", 1, 1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UsageError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:9"):
        ray_run(tmp_path / "run", options_of(calm), shards)


def test_pools_cannot_be_wrong() -> None:
    for wrong in (
        {"actors": (0, 1)},
        {"actors": (3, 2)},
        {"cpus": -1.0},
        {"gpus": 1.5},
        {"cpus": 0.0},
        {"gpus": float("nan")},
    ):
        with pytest.raises(UsageError, match="actor"):
            Pool(**wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(HAS_RAY, reason="needs an environment without Ray")
def test_without_ray_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'latentguard\[ray\]'"):
        need_ray()
