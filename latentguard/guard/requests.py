"""Whose verdicts are asked for: where a call ran, and requests whose calls run elsewhere.

A verdict belongs to one call. Who asks without saying which call means the last one of the same
thread, asyncio task and context; a request names its call, wherever that runs.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import ref

from latentguard.errors import LatentsError
from latentguard.guard.record import CallRecord, StepRecord
from latentguard.guard.sessions import Session
from latentguard.judge import Verdict


class Place:
    """A thread, an asyncio task (or none) and a context.

    Worker threads and new tasks begin with a copy of the context, which is another place.
    """

    __slots__ = ("__weakref__", "_task", "_thread")

    def __init__(self) -> None:
        task = _task()
        self._thread = ref(threading.current_thread())
        self._task = None if task is None else ref(task)

    def is_here(self) -> bool:
        """Whether the caller runs there."""
        task = None if self._task is None else self._task()
        same_task = task is _task() and (task is None) == (self._task is None)
        return same_task and self._thread() is threading.current_thread()


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


_place: ContextVar[Place | None] = ContextVar("latentguard_place", default=None)


def here() -> Place:
    """The place that this is called in."""
    place = _place.get()
    if place is None or not place.is_here():
        place = Place()
        _place.set(place)
    return place


class Request:
    """The guarded calls of one request: see `LatentGuard.request`.

    id: the name that records and audit lines of its calls carry.
    """

    def __init__(self, guard: Any, id: str | None) -> None:
        self.id = id or uuid.uuid4().hex
        self._guard = guard
        self._open = True
        self._sessions: list[Session] = []

    @property
    def calls(self) -> list[CallRecord]:
        """What the guard said of each call that has ended, in the order in which they did."""
        return [CallRecord.of([session]) for session in list(self._sessions)]

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on each image of its calls. Raises LatentsError where none has ended."""
        return [verdict for call in self._ended() for verdict in call.verdicts]

    @property
    def history(self) -> list[StepRecord]:
        """Each scored step of its calls. Raises LatentsError where none has ended."""
        return [record for call in self._ended() for record in call.history]

    def _ended(self) -> list[CallRecord]:
        calls = self.calls
        if not calls:
            raise LatentsError(
                f"no call of this guard has ended in request {self.id!r}: a call in another thread "
                "belongs to it where that runs in a copy of its context (asyncio.to_thread, or "
                "contextvars.copy_context().run)"
            )
        return calls


_requests: ContextVar[tuple[Request, ...]] = ContextVar("latentguard_requests", default=())


@contextmanager
def opened(request: Request) -> Iterator[Request]:
    """Calls of its guard that begin while this is open belong to a request, in copies of this
    context too.

    It may be closed in another context than it was opened in, as servers do with generators.
    """
    token = _requests.set((*_requests.get(), request))
    try:
        yield request
    finally:
        request._open = False
        with suppress(ValueError):  # in another context there is nothing to take back
            _requests.reset(token)


def request_of(guard: Any) -> Request | None:
    """The innermost open request of a guard that the caller belongs to."""
    return next(
        (one for one in reversed(_requests.get()) if one._guard is guard and one._open), None
    )


def add_to_request(guard: Any, session: Session) -> None:
    """A call of a guard has ended: it belongs to the request that it began in, open or not."""
    for one in reversed(_requests.get()):
        if one._guard is guard and one.id == session.request_id:
            one._sessions.append(session)
            return
