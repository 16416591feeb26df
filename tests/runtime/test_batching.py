"""Batching: what is put together, who waits how long, and that overload is an error."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from latentguard.runtime import Batching, Overloaded
from latentguard.runtime.batching import Batcher, Outputs

LONG = 60_000.0
"""A delay in milliseconds that no test waits for: only a full batch or closing ends it."""


class Recorder:
    """A `run` that remembers its batches, and waits at a gate."""

    def __init__(self, open_gate: bool = True) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        if open_gate:
            self.gate.set()

    def __call__(self, array: np.ndarray) -> Outputs:
        self.batches.append(array.shape)
        self.entered.set()
        assert self.gate.wait(600)
        return {
            "first": array.reshape(len(array), -1)[:, 0],
            "shape": np.full(len(array), array.shape[2]),
        }


def image(value: float, count: int = 1, side: int = 4) -> np.ndarray:
    return np.full((count, 2, side, side), value, np.float32)


def waiting(batcher: Batcher, count: int) -> None:
    """Until so many jobs wait."""
    until = time.monotonic() + 600
    while len(batcher._waiting) < count:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_full_batch_runs_at_once_and_every_caller_gets_its_rows() -> None:
    run = Recorder()
    batcher = Batcher(run, Batching(max_batch=6, max_delay_ms=LONG))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda n: batcher(image(n, 2)), [1.0, 2.0, 3.0]))
    assert run.batches == [(6, 2, 4, 4)]
    assert [list(outputs["first"]) for outputs in found] == [[1, 1], [2, 2], [3, 3]]
    batcher.close()


def test_sizes_that_alternate_still_make_batches() -> None:
    run = Recorder(open_gate=False)
    batcher = Batcher(run, Batching(max_batch=4, max_delay_ms=0))
    with ThreadPoolExecutor(9) as pool:
        blocker = pool.submit(batcher, image(0))
        assert run.entered.wait(600)
        jobs = []
        for n in range(8):  # one after the other, so that the sizes do alternate
            jobs.append(pool.submit(batcher, image(n, side=4 if n % 2 else 8)))
            waiting(batcher, n + 1)
        run.gate.set()
        found = [job.result() for job in jobs]
        blocker.result()
    assert run.batches == [(1, 2, 4, 4), (4, 2, 8, 8), (4, 2, 4, 4)]
    assert [float(outputs["first"][0]) for outputs in found] == list(range(8))
    assert [int(outputs["shape"][0]) for outputs in found] == [8, 4] * 4
    batcher.close()


def test_an_array_of_more_than_a_batch_runs_by_itself() -> None:
    run = Recorder()
    batcher = Batcher(run, Batching(max_batch=2, max_delay_ms=LONG))
    assert len(batcher(image(1, 5))["first"]) == 5
    assert run.batches == [(5, 2, 4, 4)]
    batcher.close()


def test_the_delay_ends_the_wait() -> None:
    run = Recorder()
    batcher = Batcher(run, Batching(max_batch=1000, max_delay_ms=1))
    assert batcher(image(3))["first"] == 3
    batcher.close()


def test_overload_is_an_error_at_once_and_nothing_else_is_lost() -> None:
    run = Recorder(open_gate=False)
    batcher = Batcher(run, Batching(max_batch=1, queue=2))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(batcher, image(0))]
        assert run.entered.wait(600)
        for n in (1, 2):
            jobs.append(pool.submit(batcher, image(n)))
            waiting(batcher, n)
        with pytest.raises(Overloaded, match="2 arrays are waiting already"):
            batcher(image(3))
        run.gate.set()
        assert [float(job.result()["first"][0]) for job in jobs] == [0, 1, 2]
    assert len(run.batches) == 3
    batcher.close()


def test_who_gave_up_costs_nothing_more() -> None:
    run = Recorder(open_gate=False)
    batcher = Batcher(run, Batching(max_batch=1, timeout=0.5))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(batcher, image(0))
        assert run.entered.wait(600)
        with pytest.raises(Overloaded, match=r"no answer within 0\.5 s"):
            batcher(image(1))
        with pytest.raises(Overloaded):
            first.result()
    run.gate.set()
    batcher.close()
    assert len(run.batches) == 1


def test_an_error_reaches_every_caller_of_its_batch_and_no_other() -> None:
    def run(array: np.ndarray) -> Outputs:
        if (array == 13).any():
            raise RuntimeError("out of something")
        return {"first": array[:, 0, 0, 0]}

    batcher = Batcher(run, Batching(max_batch=2, max_delay_ms=LONG))
    with ThreadPoolExecutor(2) as pool:
        pair = [pool.submit(batcher, image(13)), pool.submit(batcher, image(1))]
        for job in pair:
            with pytest.raises(RuntimeError, match="out of something"):
                job.result()
        pair = [pool.submit(batcher, image(2)), pool.submit(batcher, image(1))]
        assert sorted(float(job.result()["first"][0]) for job in pair) == [1, 2]
    batcher.close()


def test_closing_answers_what_waits_and_refuses_what_comes() -> None:
    run = Recorder()
    batcher = Batcher(run, Batching(max_batch=100, max_delay_ms=LONG))
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(batcher, image(n)) for n in range(3)]
        waiting(batcher, 3)
        batcher.close()
        assert [float(job.result()["first"][0]) for job in jobs] == [0, 1, 2]
    assert run.batches == [(3, 2, 4, 4)]
    with pytest.raises(Overloaded, match="closed"):
        batcher(image(1))
    batcher.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch and queue must be at least 1, got 0 and 256"),
        ({"queue": 0}, "got 16 and 0"),
        ({"max_delay_ms": -1}, "max_delay_ms must be at least 0"),
        ({"timeout": 0}, "timeout above 0"),
        ({"timeout": float("nan")}, "timeout above 0"),
    ],
)
def test_bounds_that_leave_room_for_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batching(**options)
