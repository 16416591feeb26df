"""The local engine: some processes read, and this process judges and writes.

Each reader has a thread here, which passes it shards and receives its batches. If the reader dies,
the thread passes its shard to another one. This process judges batches as they arrive, several at a
time where that is faster (`Judges.lanes`), and writes their records in the order of arrival. The
batches of one shard arrive in order, because they come from one reader.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Condition, Lock, Thread

from latentguard.errors import LatentsError, TooManyErrorsError, UsageError
from latentguard.files import ArrayRecord
from latentguard.scan.entry import Entry
from latentguard.scan.judging import Judging
from latentguard.scan.options import RunOptions
from latentguard.scan.reader import GO, READY, NoRoom, held, receive, send, serve
from latentguard.scan.record import ScanRecord
from latentguard.scan.run import Run, Told, fail_unit, ignored
from latentguard.scan.shard import Facts, Shard
from latentguard.scan.unit import Unit

ATTEMPTS = 3
"""How many readers may die on a shard before it counts as unreadable."""

STARTS = 10
"""How many readers in a row may be killed before they are ready."""

MAX_MEMORY = 256 << 20
"""Default limit of decoded latents that are on their way, in bytes."""

_GUESS = 1 << 20


def run_local(
    run: Run,
    judging: Judging,
    *,
    workers: int,
    max_memory: int = MAX_MEMORY,
    max_errors: int | None = None,
    told: Told = ignored,
) -> None:
    """Scan the rest of a run's task on this machine, and close the run.

    Args:
        workers: processes that read; 0 reads in this one.
        max_memory: bytes of decoded latents between the readers and the model, or one batch.
        max_errors: stop once the run has more records of what could not be read or judged.
        told: called with the records of each batch, in the order in which they are judged. A shard
            whose reader died is judged anew, so records can come twice here, in no part.

    Raises:
        TooManyErrorsError: beyond `max_errors`.
        OSError: there is no room for what is written or copied.
        UsageError: readers cannot be started, or the run's place cannot be written.
    """
    with run.at_work(judging):
        check_errors(run, max_errors)
        while pending := run.pending():
            if workers:
                _Driver(run, judging, told, max_errors).work(pending, workers, max_memory)
                continue
            for shard in pending:
                run.scan(shard, judging, told)
                check_errors(run, max_errors)


def check_errors(run: Run, max_errors: int | None) -> None:
    if max_errors is not None and run.errors > max_errors:
        raise TooManyErrorsError(
            f"stopped: {run.errors:,} images or files could not be read or judged, over "
            f"--max-errors {max_errors:,}; {run.place} lists them, and --resume continues"
        )


# -- what threads tell the driver ------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    shard: Shard
    records: list[ArrayRecord]
    size: int


@dataclass(frozen=True)
class _Read:
    """A shard was read to its end."""

    shard: Shard
    facts: Facts


@dataclass(frozen=True)
class _Lost:
    """The reader of a shard died. reason: why nobody else reads it, None where somebody does."""

    shard: Shard
    reason: str | None


@dataclass(frozen=True)
class _Failed:
    """The run cannot go on."""

    error: Exception


class _Done:
    """A thread has no more to do."""


class _Judged:
    """A batch has been judged."""


_Event = _Batch | _Read | _Lost | _Failed | _Done | _Judged
_Next = tuple[_Batch, Future[tuple[list[ScanRecord], float]]] | _Read | _Lost | _Failed
"""What is written next, of a batch once it has been judged."""


class _Budget:
    """Bytes that may be on their way at once."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._open = limit, 0, True
        self._changed = Condition()

    def take(self, size: int) -> None:
        """Wait until there is room; a single batch always has some."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._open or self._used == 0 or self._used + size <= self._limit
            )
            self._used += size

    def change(self, by: int) -> None:
        with self._changed:
            self._used += by
            self._changed.notify_all()

    def close(self) -> None:
        """Wake up all that wait."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


# -- the driver ------------------------------------------------------------------------------


class _Driver:
    def __init__(self, run: Run, judging: Judging, told: Told, max_errors: int | None) -> None:
        self._run, self._judging, self._told = run, judging, told
        self._max_errors = max_errors
        self._units: dict[int, Unit] = {}

    def work(self, pending: Sequence[Shard], workers: int, max_memory: int) -> None:
        budget = _Budget(max_memory)
        events: SimpleQueue[_Event] = SimpleQueue()
        waiting: deque[_Next] = deque()
        lanes = ThreadPoolExecutor(self._judging.judges.lanes)
        work = _Work(pending)
        readers = [
            _Supervisor(work, events, budget, self._run.options)
            for _ in range(min(workers, len(pending)))
        ]
        threads = [Thread(target=reader.run, daemon=True) for reader in readers]
        try:
            for thread in threads:
                thread.start()
            left = len(threads)
            while left or waiting:
                event = events.get()
                if isinstance(event, _Batch):
                    judged = lanes.submit(self._judging.timed, event.records)
                    judged.add_done_callback(lambda _: events.put(_Judged()))
                    waiting.append((event, judged))
                elif isinstance(event, _Done):
                    left -= 1
                elif not isinstance(event, _Judged):
                    waiting.append(event)
                # What was judged early waits for those before it.
                while waiting and self._ready(waiting[0]):
                    self._write(waiting.popleft(), budget)
        finally:
            work.stop()
            budget.close()
            for reader in readers:
                reader.stop()
            for unit in self._units.values():
                unit.abandon()
            for thread in threads:
                thread.join(timeout=10)
            lanes.shutdown(cancel_futures=True)

    @staticmethod
    def _ready(next_one: _Next) -> bool:
        return not isinstance(next_one, tuple) or next_one[1].done()

    def _write(self, next_one: _Next, budget: _Budget) -> None:
        if not isinstance(next_one, tuple):
            self._finish(next_one)
            return
        batch, judged = next_one
        records, seconds = judged.result()
        self._unit(batch.shard).add(records, seconds)
        self._told(records)
        budget.change(-batch.size)

    def _unit(self, shard: Shard) -> Unit:
        if shard.number not in self._units:
            self._units[shard.number] = Unit(
                self._run.store, shard, self._run.options, self._judging.judges
            )
        return self._units[shard.number]

    def _finish(self, event: _Read | _Lost | _Failed) -> None:
        if isinstance(event, _Failed):
            raise event.error
        if isinstance(event, _Read):
            unit = self._unit(event.shard)
            try:
                self._note(unit.commit(event.facts))
            except LatentsError as error:
                self._give_up(event.shard, str(error))
            finally:
                self._units.pop(event.shard.number).abandon()
            return
        unit_of_lost = self._units.pop(event.shard.number, None)
        if unit_of_lost is not None:
            unit_of_lost.abandon()
        if event.reason is not None:
            self._give_up(event.shard, event.reason)

    def _give_up(self, shard: Shard, reason: str) -> None:
        run = self._run
        self._note(fail_unit(run.store, shard, run.options, self._judging, reason))

    def _note(self, entry: Entry) -> None:
        self._run.note(entry)
        check_errors(self._run, self._max_errors)


# -- readers ---------------------------------------------------------------------------------


class _Work:
    """The shards that were not read yet."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._waiting = deque((shard, 1) for shard in shards)
        self._reading = 0
        self._changed = Condition()

    def take(self) -> tuple[Shard, int] | None:
        """The next shard and the number of the attempt; None where all are read.

        While others read, it waits: one of them may die, and its shard come back.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._reading)
            if not self._waiting:
                return None
            self._reading += 1
            return self._waiting.popleft()

    def finish(self, again: tuple[Shard, int] | None = None) -> None:
        """What was taken is read, or has to be read again."""
        with self._changed:
            self._reading -= 1
            if again is not None:
                self._waiting.appendleft(again)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._waiting.clear()
            self._reading = 0
            self._changed.notify_all()


class _Supervisor:
    """The thread of one reader, and of those that take its place."""

    def __init__(
        self, work: _Work, events: SimpleQueue[_Event], budget: _Budget, options: RunOptions
    ) -> None:
        self._work, self._events, self._budget, self._options = work, events, budget, options
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._stopped = False
        self._lock = Lock()

    def run(self) -> None:
        try:
            while (job := self._work.take()) is not None:
                self._read(*job)
        except Exception as error:  # what a thread raises would otherwise be lost
            self._events.put(_Failed(error))
        finally:
            self._end()
            self._events.put(_Done())

    def stop(self) -> None:
        """End the reader, from another thread."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.terminate()

    def _read(self, shard: Shard, attempt: int) -> None:
        try:
            self._serve(shard, self._reader())
        except (EOFError, ConnectionError):
            how = self._end()
            if self._stopped:
                return
            last = attempt >= ATTEMPTS
            reason = f"{attempt} processes that read it died, the last one with {how}"
            # The driver forgets what came of it before anybody else reads it.
            self._events.put(_Lost(shard, reason if last else None))
            self._work.finish(None if last else (shard, attempt + 1))
        else:
            self._work.finish()

    def _serve(self, shard: Shard, pipe: Connection) -> None:
        send(pipe, shard)
        expected = _GUESS
        while True:
            self._budget.take(expected)
            taken = expected
            try:
                send(pipe, GO)
                message = receive(pipe)
                if isinstance(message, NoRoom):
                    raise OSError(message.number, message.reason, message.file)
                if isinstance(message, Facts):
                    self._events.put(_Read(shard, message))
                    return
                expected = held(message)
                self._budget.change(expected - taken)
                self._events.put(_Batch(shard, message, expected))
                taken = 0
            finally:
                self._budget.change(-taken)

    def _reader(self) -> Connection:
        """The pipe to a reader, which is started where there is none."""
        if self._pipe is not None:
            return self._pipe
        for attempt in range(STARTS):
            pipe = self._start()
            with suppress(EOFError, ConnectionError):
                if receive(pipe) == READY:
                    return pipe
            how = self._end()
            if self._stopped:
                raise EOFError
            if not how.startswith("signal") and attempt + 1 >= ATTEMPTS:
                break  # nobody killed it, so the next one will do the same
        raise UsageError(
            f"processes that read cannot be started ({how}): in a script, call this under "
            "`if __name__ == '__main__':`, or read in this process (--workers 0)"
        )

    def _start(self) -> Connection:
        # Not a fork: locks of threads, and CUDA, do not survive one.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._pipe = ours
        process = context.Process(target=serve, args=(theirs, self._options), daemon=True)
        with self._lock:
            if self._stopped:
                raise EOFError
            process.start()
            self._process = process
        theirs.close()
        return ours

    def _end(self) -> str:
        """End the reader if there is one; how it ended."""
        if self._pipe is not None:
            with suppress(OSError):
                send(self._pipe, None)
            self._pipe.close()
            self._pipe = None
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return "nothing"
        process.join(timeout=5)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"
