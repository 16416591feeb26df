"""What runs in this thread: the guarded call, and the calls that wait for a callback."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

CALLBACK, INPUTS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"
"""The arguments of a pipeline's call by which diffusers takes callbacks."""

INTO_BLOCKS = (
    "put it into the blocks, pipe = guard.into(blocks).init_pipeline(...), where pipe.blocks are "
    "those of a pipeline that there is already"
)
"""How a modular pipeline is guarded, for the messages of all other ways."""

current: ContextVar[Any] = ContextVar("latentguard_call", default=None)
"""The guarded call (`latentguard.guard.call.GuardedCall`) that runs in this thread, or None."""
waiting: ContextVar[tuple[Any, ...]] = ContextVar("latentguard_waiting", default=())
"""The calls in this thread that wait for a callback of the user's, outermost first."""


class Marked:
    """What LatentGuard is known by where it cannot be imported."""
