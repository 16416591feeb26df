"""The `__call__` of a subclass that hands its arguments on, from its beginning to its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latentguard.errors import LatentsError
from latentguard.guard.components import wrap_components

if TYPE_CHECKING:
    from latentguard.guard.adapter import LatentGuard
    from latentguard.guard.call import GuardedCall
    from latentguard.guard.retry import Again


class Outermost:
    """Watches what such a subclass does of its own around the guarded calls of its parent.

    It may denoise and decode once more when its parent's call has ended (a second pass at a larger
    size). What is decoded then, and what is returned in the end, is judged by the guards of the
    last of those calls; a step that nothing decoded comes after is withheld. What it decodes before
    any of those calls is judged by itself, each batch as a call of its own.

    given: the guards that it was called with. judging: makes a call of these, which judges what is
    decoded before any guarded call. again: where it repeats another one.
    """

    def __init__(
        self,
        pipe: Any,
        given: list[LatentGuard],
        judging: Callable[[], GuardedCall],
        again: Again | None = None,
    ) -> None:
        self.pipe = pipe
        self.given = given
        self.again = again
        self.calls: list[GuardedCall] = []
        self._judging_before = judging
        self._before: GuardedCall | None = None  # that of the last batch that was decoded so
        if given:
            wrap_components(pipe)
        self._judged: list[LatentGuard] = []
        self._judging: GuardedCall | None = None
        self._stepped = False  # since something was decoded
        self._touched = False  # since the last guarded call
        self._missed = False  # a call within was made without a guard that this was called with

    @property
    def judging(self) -> GuardedCall | None:
        """The call that what is returned was judged by."""
        return self._judging

    @property
    def guards(self) -> list[LatentGuard]:
        """Those that have judged what was made so far."""
        return [] if self._judging is None else self._judging.guards

    def enters(self, original: Callable[..., Any]) -> bool:
        """A parent's `__call__` within this is a guarded call of its own."""
        return False

    def begins_loop(self) -> bool:
        """Whether a loop may begin outside of the guarded calls: one of them has judged before."""
        self._stepped = self._touched = True
        return self._judging is not None

    # -- the guarded calls within --------------------------------------------------------------

    def began(self, call: GuardedCall) -> None:
        """A guarded call has judged something, whether it returns or not."""
        self.calls.append(call)

    def returned(self, call: GuardedCall) -> None:
        """A call gave its output to the subclass."""
        self._missed = self._missed or any(guard not in call.guards for guard in self.given)
        if call.guards:
            self._judged += call.guards
            self._judging = call
            self._stepped = self._touched = False

    def hand_up(self, outer: Outermost) -> None:
        """This ends within that of a subclass's subclass, which may go on from here."""
        outer.calls += self.calls
        outer._judged += self._judged
        outer._judging = self._judging or outer._judging
        outer._missed = outer._missed or self._missed
        outer._stepped = outer._touched = False

    # -- what the patches report ---------------------------------------------------------------

    def scheduler_step(
        self, original: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any
    ) -> Any:
        """A step of the subclass's own: what it leads to has to be seen."""
        self._stepped = self._touched = True
        return original(scheduler, *args, **kwargs)

    def saw_size(self, arguments: Any) -> None:
        """The size of a loop of the subclass's own, which the spatial latents tell as well."""

    def saw_first(self, prepared: Any) -> None:
        """The latents that a loop of the subclass's own begins with: only its end is judged."""

    def before_decode(self, z: Tensor) -> Tensor:
        """What the VAE is about to decode, with zeros for images that are blocked."""
        if self._judging is not None:
            self._stepped, self._touched = False, True
            return self._judging.before_decode(z)
        if not self.given:
            return z
        # A `decode` within a `decode` gets what was judged already.
        if self._before is None or not self._before.let_through(z):
            self._before = self._judging_before()
            self.calls.append(self._before)
        return self._before.before_decode(z)

    # -- the end ---------------------------------------------------------------------------------

    def finish(self, output: Any, guards: list[LatentGuard]) -> Any:
        """What the subclass returned, as far as it may be seen.

        Raises LatentsError where one of `guards` has judged none of the calls within.
        """
        if not guards and self._judging is None:
            return output  # callbacks of another kind alone
        if self._judging is None or any(guard not in self._judged for guard in guards):
            raise LatentsError(
                f"{type(self.pipe).__name__} returned without calling its parent class with the "
                "guard, so nothing was judged and its output is withheld"
            )
        if self._missed:
            raise LatentsError(
                f"{type(self.pipe).__name__} called its parent class without the guard too, so "
                "what it returned may be what nobody judged, and it is withheld: hand "
                "callback_on_step_end on to each call, or attach the guard"
            )
        return self._judging.finish_again(output, self._touched, self._stepped)
