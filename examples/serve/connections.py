"""Connections that ask nothing may not keep those out that do."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]


def may_be_open(wanted: int) -> int:
    """How many connections to hold: half of the files that this process may open, at most."""
    if resource is None:
        return wanted
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft // 2))


class Connection(H11Protocol):
    """HTTP as uvicorn speaks it, for a client that has to ask within a time.

    Where more than `limit` are open, the one that has been idle longest is closed for the newest;
    where none is idle, the newest itself: each request that is under way ends by its own limits.
    """

    limit = 1024
    seconds = 10.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None
        self._wait()
        while self._open() > self.limit:
            idle = [one for one in self.connections if isinstance(one, Connection) and one.is_idle]
            others = [one for one in idle if one is not self]
            oldest = min(others, key=lambda one: one._since, default=self)
            oldest.transport.close()

    def data_received(self, data: bytes) -> None:
        self._since = self.loop.time()
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether it is open, and no whole head of a request waits for its answer."""
        asked = self.cycle is not None and not self.cycle.response_complete
        return not asked and not self.transport.is_closing()

    def _open(self) -> int:
        return sum(not one.transport.is_closing() for one in self.connections)

    def _wait(self) -> None:
        """Give a client that has not asked until the deadline; no more for each byte it sends."""
        if not self.is_idle:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.seconds, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        if self.is_idle:
            self.transport.close()


def connections(limit: int, seconds: float) -> type[Connection]:
    """The protocol for `uvicorn.run(http=...)`, which makes one of it for each connection."""
    return type("Connection", (Connection,), {"limit": limit, "seconds": seconds})
