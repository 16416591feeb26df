"""Dynamic batching: arrays of several threads become one batch, each thread gets its own rows."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Outputs = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Batching:
    """How long, and for how many images, a batch waits.

    max_batch: images a batch. max_delay_ms: how long the first of a batch waits for others.
    queue: arrays that may wait; a further one fails at once, so that overload is seen.
    timeout: seconds after which a caller gives up.
    """

    max_batch: int = 16
    max_delay_ms: float = 2.0
    queue: int = 256
    timeout: float = 60.0


class Overloaded(RuntimeError):  # noqa: N818 (a state, not a fault)
    """The queue is full, or the answer took too long: the images have not been judged."""


class _Job:
    def __init__(self, array: Array) -> None:
        self.array = array
        self.done = threading.Event()
        self.outputs: Outputs = {}
        self.error: BaseException | None = None


class Batcher:
    """A thread that runs `run` on what other threads hand in. Close it when done."""

    def __init__(self, run: Callable[[Array], Outputs], options: Batching) -> None:
        self._run = run
        self._options = options
        self._jobs: queue.Queue[_Job | None] = queue.Queue(options.queue)
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="latentguard", daemon=True)
        self._thread.start()

    def __call__(self, array: Array) -> Outputs:
        """The outputs of an array, computed together with those of other threads.

        Raises Overloaded, or what `run` raised on the batch.
        """
        job = _Job(array)
        if self._closed:
            raise Overloaded("the guard is closed")
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Overloaded(f"more than {self._options.queue} requests are waiting") from None
        if not job.done.wait(self._options.timeout):
            raise Overloaded(f"no answer within {self._options.timeout:g} s")
        if job.error is not None:
            raise job.error
        return job.outputs

    def close(self) -> None:
        """Answer what waits, then stop."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()

    def _serve(self) -> None:
        held: _Job | None = None
        while True:
            first = held or self._jobs.get()
            held = None
            if first is None:
                return self._drain()
            jobs, held, last = self._collect(first)
            self._answer(jobs)
            if last:
                return self._drain()

    def _collect(self, first: _Job) -> tuple[list[_Job], _Job | None, bool]:
        """Further jobs of the same shape; one that does not fit any more; whether to stop."""
        jobs, count = [first], len(first.array)
        until = time.monotonic() + self._options.max_delay_ms / 1e3
        while count < self._options.max_batch:
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return jobs, None, True
            fits = count + len(job.array) <= self._options.max_batch
            if not fits or job.array.shape[1:] != first.array.shape[1:]:
                return jobs, job, False
            jobs.append(job)
            count += len(job.array)
        return jobs, None, False

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            outputs = self._run(np.concatenate([job.array for job in jobs]))
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

    def _drain(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                self._answer([job])
