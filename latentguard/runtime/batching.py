"""Dynamic batching: arrays of several threads become one batch, each thread gets its own rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentGuardError

Array = NDArray[np.float32]
Outputs = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Batching:
    """How long, and for how many images, a batch waits.

    max_batch: images a batch; an array of more is a batch of its own.
    max_delay_ms: how long the first of a batch waits for others of its size.
    queue: arrays that may wait; a further one is `Overloaded` at once.
    timeout: seconds after which a waiting one is `Overloaded`.

    Raises ValueError for a bound that leaves room for nothing.
    """

    max_batch: int = 16
    max_delay_ms: float = 2.0
    queue: int = 256
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.queue < 1:
            raise ValueError(
                f"max_batch and queue must be at least 1, got {self.max_batch} and {self.queue}"
            )
        if not (self.max_delay_ms >= 0 and self.timeout > 0):
            raise ValueError(
                f"max_delay_ms must be at least 0 and timeout above 0, got {self.max_delay_ms} "
                f"and {self.timeout}"
            )


class Overloaded(LatentGuardError, RuntimeError):  # noqa: N818 (a state, not a fault)
    """There was no room, or no time: these images have not been judged. Ask again later."""


class _Job:
    def __init__(self, array: Array) -> None:
        self.array = array
        self.since = time.monotonic()
        self.done = threading.Event()
        self.outputs: Outputs = {}
        self.error: BaseException | None = None


class Batcher:
    """A thread that runs `run` on what other threads hand in. Close it when done."""

    def __init__(self, run: Callable[[Array], Outputs], options: Batching) -> None:
        self._run = run
        self._options = options
        self._waiting: list[_Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="latentguard", daemon=True)
        self._thread.start()

    def __call__(self, array: Array) -> Outputs:
        """The outputs of an array, computed together with those of other threads.

        Raises Overloaded, or what `run` raised on the batch.
        """
        job = _Job(array)
        with self._changed:
            if self._closed:
                raise Overloaded("the guard is closed")
            if len(self._waiting) >= self._options.queue:
                raise Overloaded(f"{self._options.queue} arrays are waiting already")
            self._waiting.append(job)
            self._changed.notify()
        if not job.done.wait(self._options.timeout):
            with self._changed:
                if job in self._waiting:  # nobody waits for it any more: spare the work
                    self._waiting.remove(job)
            raise Overloaded(f"no answer within {self._options.timeout:g} s")
        if job.error is not None:
            raise job.error
        return job.outputs

    def close(self) -> None:
        """Answer what waits, then stop; what comes later is `Overloaded`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while jobs := self._next():
            self._answer(jobs)

    def _next(self) -> list[_Job]:
        """The oldest job and those of its size; none when there is nothing left to do."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                jobs, full = self._batch()
                left = jobs[0].since + self._options.max_delay_ms / 1e3 - time.monotonic()
                if full or self._closed or left <= 0:
                    self._waiting = [job for job in self._waiting if job not in jobs]
                    return jobs
                self._changed.wait(left)

    def _batch(self) -> tuple[list[_Job], bool]:
        """What would run now, oldest first, and whether there is no room for more."""
        first = self._waiting[0]
        jobs, count = [first], len(first.array)
        for job in self._waiting[1:]:
            if job.array.shape[1:] != first.array.shape[1:]:
                continue
            if count + len(job.array) > self._options.max_batch:
                return jobs, True
            jobs.append(job)
            count += len(job.array)
        return jobs, count >= self._options.max_batch

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            arrays = [job.array for job in jobs]
            outputs = self._run(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
            begin = 0
            for job in jobs:
                end = begin + len(job.array)
                job.outputs = {name: value[begin:end] for name, value in outputs.items()}
                begin = end
        except BaseException as error:  # each caller learns that its images were not judged
            for job in jobs:
                job.error = error
        for job in jobs:
            job.done.set()
