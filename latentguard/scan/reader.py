"""A process that reads shards and sends batches of arrays. It loads no model and no torch.

Messages go only between processes of one run. The driver names a shard, and then sends `GO` for
each batch, so that no more is decoded than it has room for.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from latentguard.files import ArrayRecord
from latentguard.scan.options import RunOptions
from latentguard.scan.shard import Facts, read_shard

READY, GO = "ready", "go"


@dataclass(frozen=True)
class NoRoom:
    """Errors that say nothing about a shard, such as a full disk on this machine during a copy."""

    number: int
    reason: str
    file: str


def serve(pipe: Connection, options: RunOptions) -> None:
    """Read what the driver asks for, until it sends None or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what becomes of its readers
    try:
        send(pipe, READY)
        while (shard := receive(pipe)) is not None:
            facts = Facts()
            batches = read_shard(shard, options, facts)
            while receive(pipe) == GO:
                batch = next(batches, None)
                send(pipe, facts if batch is None else batch)
                if batch is None:
                    break
            else:
                return
    except OSError as error:
        if not isinstance(error, (BrokenPipeError, ConnectionError)):
            said = NoRoom(error.errno or 0, error.strerror or str(error), str(error.filename))
            send(pipe, said)
    except EOFError:
        return


def send(pipe: Connection, message: Any) -> None:
    """Send anything. Raises OSError if the other end is gone."""
    pipe.send(message)


def receive(pipe: Connection) -> Any:
    """The next message. Raises EOFError or ConnectionError if the other end is gone."""
    try:
        return pipe.recv()
    except OSError as error:
        if error.errno is None:  # "got end of file during message"
            raise EOFError(str(error)) from error
        raise


def held(batch: list[ArrayRecord]) -> int:
    """Bytes of the arrays of a batch."""
    return sum(record.latents.array.nbytes for record in batch if record.latents is not None)


def default_workers() -> int:
    """The number of readers that keep one model busy without taking its cores."""
    return max(1, min(4, (os.cpu_count() or 1) // 2))
