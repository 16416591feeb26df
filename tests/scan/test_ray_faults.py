"""Actors, nodes and drivers of a Ray cluster that are killed at random moments lose nothing."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_helpers import (
    actors,
    add_node,
    assert_same,
    kill_driver,
    needs_ray,
    on_its_own,
    ray_run,
    started,
    two_nodes,
)
from run_helpers import options_of, scan_run, write_shards

pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)

KILLS = 20


class _Killing:
    """Kills at random moments, and how often it has killed what."""

    def __init__(self, cluster: Any, seed: int) -> None:
        self._cluster, self._random = cluster, random.Random(seed)
        self.killed: Counter[str] = Counter()

    def work(self, place: Path, shards: list[Path], policy: Path) -> bool:
        """Go on with a run until its driver ends. Whether it did so by itself."""
        driver = started(place, shards, policy)
        while driver.poll() is None and self.killed.total() < KILLS:
            time.sleep(self._random.uniform(0.1, 3.0))
            working = actors()
            what = self._random.choices(("actor", "driver", "node"), (6, 2, 1))[0]
            if what == "driver" and driver.poll() is None:
                kill_driver(driver, working)
            elif what == "actor" and working:
                try:
                    self._random.choice(working).kill()
                except psutil.Error:
                    continue
            elif what == "node" and working:
                node = self._random.choice(list(self._cluster.worker_nodes))
                self._cluster.remove_node(node, allow_graceful=False)
                add_node(self._cluster)
            else:
                continue
            self.killed[what] += 1
        return driver.wait() >= 0


def kill_at_random(tmp_path: Path, policy: Path, seed: int) -> Counter[str]:
    """Runs whose actors, nodes and drivers are killed, until `KILLS` have been; then each goes on
    undisturbed, and is what it would have been. What was killed how often."""
    shards = write_shards(tmp_path / "shards", 6, 30)
    options = options_of(policy, batch_size=2)
    whole = scan_run(tmp_path / "whole", options, shards)
    places = [tmp_path / "0"]
    with two_nodes() as cluster, pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_ADDRESS", cluster.address)
        killing = _Killing(cluster, seed)
        while killing.killed.total() < KILLS:
            if killing.work(places[-1], shards, policy):
                places.append(tmp_path / str(len(places)))
        for place in places:
            # What was given up, as its actors were killed again and again, is tried again.
            assert_same(ray_run(place, options, shards, resume=True), whole)
    return killing.killed


@needs_ray
@pytest.mark.slow
def test_killed_at_twenty_random_moments(
    tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_its_own(monkeypatch)
    killed = kill_at_random(tmp_path, calm, seed=0)
    assert killed.total() == KILLS
