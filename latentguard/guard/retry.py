"""`on_block: retry`: what is blocked is generated anew with other seeds, at most n times.

The whole call is repeated with new generators, as a pipeline makes the images of a call together.
Of each repetition only those images are taken that were blocked before and that all guards have
judged and allowed. Whatever goes wrong in one leaves what is blocked black.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from latentguard.errors import LatentsError
from latentguard.guard.record import Attempt, Outcome
from latentguard.guard.sessions import Session

if TYPE_CHECKING:
    from latentguard.guard.adapter import LatentGuard
    from latentguard.guard.call import GuardedCall

logger = logging.getLogger("latentguard.guard")

_BYTES = 6
"""Of a seed: numbers that every reader of JSON keeps."""


@dataclass
class Again:
    """One repetition of a call.

    number: from 1. rows: the images that it is made for; None where the call that judges may have
    others. sessions: the first call's, by their guards. made: those of the repetition.
    """

    number: int
    rows: frozenset[int] | None
    sessions: dict[LatentGuard, Session]
    made: dict[LatentGuard, Session] = field(default_factory=dict)

    def add(self, guard: LatentGuard, session: Session) -> None:
        """A session of the repetition begins."""
        first = self.sessions.get(guard)
        if first is not None:
            session.continues(first, self.number)
            self.made[guard] = session


class Draws:
    """The random numbers of a call before it begins; those of its repetitions follow from them.

    generator: as the call was given it: one, a list, or None for torch's own. latents: likewise.
    The seeds come of the state of the generators, so that one that several calls go on with gives
    each of them others, and of one seed always the same follow. taken: whether the call takes a
    generator; one that takes none goes on with torch's own.
    """

    def __init__(
        self, generator: Any, latents: Any, device: torch.device, taken: bool = True
    ) -> None:
        self._given = generator
        self._taken = taken
        self.pointless = None if latents is None else "its noise was given (latents=)"
        each = generator if isinstance(generator, list | tuple) and generator else [generator]
        self._states = [_state(one, device) for one in each]
        self._devices = [_device(one) for one in each]

    def seed(self, number: int, row: int) -> int | None:
        """Of the image `row` in repetition `number`."""
        return self._seed(number, row) if self._taken else None

    def _seed(self, number: int, row: int) -> int:
        state = self._states[row if row < len(self._states) else 0]
        digest = hashlib.sha256(state + number.to_bytes(2)).digest()
        return int.from_bytes(digest[:_BYTES])

    def generator(self, number: int) -> Any:
        """In the form in which the call was given one."""
        made = [
            torch.Generator(device).manual_seed(self._seed(number, index))
            for index, device in enumerate(self._devices)
        ]
        return made if isinstance(self._given, list | tuple) else made[0]


def _state(generator: Any, device: torch.device) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    own = torch.get_rng_state().numpy().tobytes()
    if device.type == "cpu":
        return own
    there = torch.get_device_module(device).get_rng_state()
    return own + bytes(there.cpu().numpy().tobytes())


def _device(generator: Any) -> torch.device:
    return generator.device if isinstance(generator, torch.Generator) else torch.device("cpu")


def seed_of(generator: Any, row: int) -> int | None:
    """The seed that an image's generator was made with; None where there is none."""
    if isinstance(generator, list | tuple):
        generator = generator[row if row < len(generator) else 0] if generator else None
    return generator.initial_seed() if isinstance(generator, torch.Generator) else None


Repeat = Callable[[Again, Any], tuple["GuardedCall | None", Any]]
"""Makes a call again, with a generator, and returns the call that has judged and the output."""


def retried(call: GuardedCall, output: Any, draws: Draws, repeat: Repeat) -> Any:
    """The output of a call, with other generations in the place of what is blocked in it."""
    wanted = call.wanted()
    tries: dict[int, list[Attempt]] = {row: [] for row in wanted}
    good: set[int] = set()
    note = "the call was interrupted" if call.interrupted else draws.pointless
    for number in itertools.count(1):
        rows = [row for row, most in wanted.items() if most >= number and row not in good]
        if note is None and any(session.late for session in call.sessions):
            note = "the timeout of the guard's budget has passed"
        if note is not None or not rows:
            break
        again = Again(number, frozenset(rows), call.by_guard())
        allowed: list[int] = []
        try:
            judged, made = repeat(again, draws.generator(number))
            other = _checked(call, judged, made)
            for row in rows:
                tries[row].append(other.tried(row, draws.seed(number, row)))
            taken = [row for row in rows if other.allows(row)]
            if taken:
                whole = len(taken) == call.count  # others may be in it that were not judged
                output = made if whole else call.merged(output, made, taken)
            allowed = taken
        except Exception as error:
            if any(session.unrecorded for session in again.made.values()):
                raise
            logger.exception("generation %d of what was blocked failed", number)
            note = f"{type(error).__name__}: {error}"
            for row in rows:
                tries[row][number - 1 :] = [Attempt(draws.seed(number, row), None, note)]
        for guard, session in again.made.items():
            again.sessions[guard].adopt(session, allowed)
        good.update(allowed)
    for row, attempts in tries.items():
        call.outcomes[row] = (
            Outcome("retried", tuple(attempts))
            if row in good
            else Outcome("blanked", tuple(attempts), note)
        )
    call.told()
    return output


def _checked(call: GuardedCall, other: GuardedCall | None, made: Any) -> GuardedCall:
    """A repetition. Raises LatentsError where its images are not those of the call."""
    count = call.count_in(made)
    if other is None or not other.count == count == call.count:
        raise LatentsError(
            f"the repetition made {count} images of which {other.count if other else 0} were "
            f"judged, and not {call.count}"
        )
    return other
