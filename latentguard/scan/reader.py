"""A process that reads: shards from its pipe to batches of arrays. It knows no model, and no torch.

Messages go between processes of one run alone. The driver says a shard, and then `GO` for
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
    """What says nothing about a shard: this machine's disk is full, for a copy."""

    number: int
    reason: str
    file: str


def serve(pipe: Connection, options: RunOptions) -> None:
    """Read what the driver asks for until it says None, or is gone."""
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
    """Send anything. Raises OSError where nobody is there to read it."""
    pipe.send(message)


def receive(pipe: Connection) -> Any:
    """The next message. Raises EOFError or OSError where whoever sent them is gone."""
    return pipe.recv()


def held(batch: list[ArrayRecord]) -> int:
    """Bytes of the arrays of a batch."""
    return sum(record.latents.array.nbytes for record in batch if record.latents is not None)


def default_workers() -> int:
    """Readers that keep one model busy without taking its cores."""
    return max(1, min(4, (os.cpu_count() or 1) // 2))
