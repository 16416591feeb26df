"""How far a scan is: for people, for logs and for monitoring, from whatever engine runs it.

An engine calls `Progress.update` with what is new; views (progress_views.py) show it.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

PHASES = {"read": "reading", "decode": "decoding", "score": "scoring"}
"""What the time of a scan goes to, and what to call it."""

_WINDOW = 30.0
_STEP = 0.5
_APART = 0.1


class Counted(Protocol):
    """What is new: a `Tally` of it, or anything else with these counts."""

    @property
    def outcomes(self) -> Counter[str]: ...

    @property
    def decisions(self) -> Counter[str]: ...

    @property
    def bytes_read(self) -> int: ...


@dataclass
class Counts:
    """The least of a `Counted`."""

    outcomes: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0


@dataclass(frozen=True)
class State:
    """How far a scan is.

    elapsed: seconds. rate: images a second, of late. busy: of each phase, which part of the time of
    its workers it took of late. bound: the phase that took the largest part, None where nobody
    measured any. shards: how many there are, None where that is not known. left: seconds until all
    of them are done, None where that cannot be told.
    """

    images: int
    outcomes: Mapping[str, int]
    decisions: Mapping[str, int]
    bytes_read: int
    seconds: Mapping[str, float]
    shards_done: int
    shards: int | None
    elapsed: float
    rate: float
    busy: Mapping[str, float]
    bound: str | None
    left: float | None
    finished: bool = False

    @property
    def blocked(self) -> float:
        """The share that is blocked, errors that block included."""
        return self.decisions.get("block", 0) / self.images if self.images else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As one JSON line of `--progress json`."""
        return {
            "images": self.images,
            "images_per_second": round(self.rate, 3),
            "outcomes": dict(self.outcomes),
            "errors": self.outcomes.get("error", 0),
            "share_blocked": round(self.blocked, 6),
            "shards_done": self.shards_done,
            "shards": self.shards,
            "seconds": round(self.elapsed, 3),
            "seconds_left": None if self.left is None else round(self.left, 1),
            "bytes_read": self.bytes_read,
            "busy": {PHASES[phase]: round(part, 4) for phase, part in self.busy.items()},
            "bound_by": self.bound,
            "finished": self.finished,
        }


class View(Protocol):
    """Shows progress somewhere."""

    def show(self, state: State) -> None:
        """Called while the scan waits, at most ten times a second."""

    def say(self, note: str) -> bool:
        """Show a sentence. Whether that was possible here."""

    def close(self, state: State) -> None:
        """The scan is over, finished or not."""


class _Rate:
    """How fast a total grows of late, however rarely it is reported."""

    def __init__(self, now: float) -> None:
        self._reports = deque([(now, 0.0)])

    def add(self, now: float, total: float) -> None:
        if total > self._reports[-1][1] and now - self._reports[-1][0] >= _STEP:
            self._reports.append((now, total))

    def each_second(self, now: float, total: float, *, still: bool) -> float:
        """still: whether what was not reported since the last time has not grown either; else it
        is taken to grow as it did."""
        while len(self._reports) > 2 and now - self._reports[1][0] >= _WINDOW:
            self._reports.popleft()
        first, (last, known) = self._reports[0], self._reports[-1]
        if len(self._reports) > 1 and not still and now - last >= _WINDOW:
            now, total = last, known
        return (total - first[1]) / max(now - first[0], 1e-9)


class Progress:
    """Adds up what an engine reports, and hands it to views.

    Args:
        shards: how many there are, None where that is not known.
        done: how many of them were done before, so that the time left is judged by the others.
        workers: how many processes read, decode and score; one each where nothing is said.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        views: Sequence[View] = (),
        *,
        shards: int | None = None,
        done: int = 0,
        workers: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._views, self._clock = views, clock
        self._shards, self._before, self._done = shards, done, done
        self._workers = {phase: (workers or {}).get(phase, 1) for phase in PHASES}
        self._outcomes: Counter[str] = Counter()
        self._decisions: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._bytes = 0
        self._begun = clock()
        self._shown = -math.inf
        self._rate = _Rate(self._begun)
        self._busy = {phase: _Rate(self._begun) for phase in PHASES}

    def update(
        self,
        delta: Counted,
        phase_seconds: Mapping[str, float] | None = None,
        *,
        shards: int = 0,
    ) -> None:
        """What is new since the last call.

        delta: images. phase_seconds: of read, decode and score, over all workers. shards: how many
        more are done.
        """
        self._outcomes.update(delta.outcomes)
        self._decisions.update(delta.decisions)
        self._bytes += delta.bytes_read
        for phase, seconds in (phase_seconds or {}).items():
            self._seconds[phase] += seconds  # type: ignore[assignment]
        self._done += shards
        now = self._clock()
        self._rate.add(now, self._outcomes.total())
        for phase, rate in self._busy.items():
            rate.add(now, float(self._seconds[phase]))
        if now - self._shown < _APART:
            return
        self._shown = now
        state = self.state()
        for view in self._views:
            view.show(state)

    def say(self, note: str) -> bool:
        """Show a sentence in the first view that can. Whether one could."""
        return any(view.say(note) for view in self._views)

    def close(self, finished: bool = True) -> None:
        """The scan is over."""
        state = self.state(finished)
        for view in self._views:
            view.close(state)

    def state(self, finished: bool = False) -> State:
        """How far it is now."""
        now, images = self._clock(), self._outcomes.total()
        seconds = {phase: float(self._seconds[phase]) for phase in PHASES}
        busy = {
            phase: self._busy[phase].each_second(now, seconds[phase], still=False)
            for phase in PHASES
            if seconds[phase] > 0
        }
        busy = {phase: min(part / self._workers[phase], 1.0) for phase, part in busy.items()}
        return State(
            images=images,
            outcomes=dict(self._outcomes),
            decisions=dict(self._decisions),
            bytes_read=self._bytes,
            seconds=seconds,
            shards_done=self._done,
            shards=self._shards,
            elapsed=now - self._begun,
            rate=self._rate.each_second(now, images, still=True),
            busy=busy,
            bound=PHASES[max(busy, key=lambda phase: busy[phase])] if busy else None,
            left=self._left(now),
            finished=finished,
        )

    def _left(self, now: float) -> float | None:
        since = self._done - self._before
        if self._shards is None or since <= 0:
            return None
        return (now - self._begun) / since * max(self._shards - self._done, 0)
