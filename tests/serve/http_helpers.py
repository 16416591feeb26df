"""The FastAPI example on a socket in this process, and bodies for it."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import uvicorn
from app import create_app, serving
from checks import Limits

from latentguard.runtime import Guard

Array = Any


def npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@contextlib.contextmanager
def listening(guard: Guard, limits: Limits) -> Iterator[tuple[str, int]]:
    """The service on a socket of its own, in this process; its host and port."""
    config = uvicorn.Config(create_app(guard, limits), port=0, **serving(limits))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(timeout=60)
