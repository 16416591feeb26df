"""Where the guard meets diffusers: four places, wrapped once for each class.

    DiffusionPipeline.callback_on_step_end   an attribute that attaches and detaches
    <pipeline class>.__call__                begins and ends a guarded call
    <scheduler class>.step                   sees the model's output, which x0 is made from
    <pipeline>.prepare_latents, <VAE>.decode see the size, and what is decoded in the end

All of them do what they did before, argument for argument, wherever no guarded call is running in
the same thread (a context variable tells), so that shared components and other threads are left
alone and no instance is changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_MARK = "_latentguard_wraps"
current: ContextVar[Any] = ContextVar("latentguard_call", default=None)
"""The guarded call (`latentguard.guard.call.Call`) that runs in this thread, or None."""


def wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, self, args, kwargs)` about the method that `cls` has under `name`.

    It is wrapped where it is defined, so that subclasses share it, and only once. The wrapper keeps
    the original's signature, which diffusers inspects.
    """
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    if owner is None:
        return
    original = vars(owner)[name]
    if hasattr(original, _MARK) or not callable(original):
        return

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, args, kwargs)

    setattr(wrapper, _MARK, True)
    setattr(owner, name, wrapper)


def wrap_call(cls: type) -> None:
    """Make `cls(...)` honour guards."""
    from latentguard.guard.call import run

    if "__call__" in vars(cls):
        wrap(cls, "__call__", run)


def wrap_components(pipe: Any) -> None:
    """Make a pipeline's scheduler and VAE report to the guarded call."""
    wrap(type(pipe.scheduler), "step", _step)
    wrap(type(pipe), "prepare_latents", _prepare_latents)
    if getattr(pipe, "vae", None) is not None:
        wrap(type(pipe.vae), "decode", _decode)


def _step(original: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    call = current.get()
    if call is None or call.pipe.scheduler is not scheduler:
        return original(scheduler, *args, **kwargs)
    return call.scheduler_step(original, scheduler, args, kwargs)


def _prepare_latents(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    call = current.get()
    if call is not None and call.pipe is pipe:
        bound = inspect.signature(original).bind(pipe, *args, **kwargs)
        call.saw_size(bound.arguments)
    return original(pipe, *args, **kwargs)


def _decode(original: Callable[..., Any], vae: Any, args: Any, kwargs: Any) -> Any:
    call = current.get()
    if call is None or getattr(call.pipe, "vae", None) is not vae:
        return original(vae, *args, **kwargs)
    bound = inspect.signature(original).bind(vae, *args, **kwargs)
    first = next(name for name in bound.arguments if name != "self")
    bound.arguments[first] = call.before_decode(bound.arguments[first])
    return original(*bound.args, **bound.kwargs)


class StepCallback:
    """The attribute `callback_on_step_end` of every pipeline: a guard, a callback, or None."""

    KEY = "_latentguard_callback"

    def __get__(self, pipe: Any, owner: type | None = None) -> Any:
        return self if pipe is None else vars(pipe).get(self.KEY)

    def __set__(self, pipe: Any, callback: Any) -> None:
        from latentguard.guard.call import check_pipeline, guards_in

        if callback is None:
            vars(pipe).pop(self.KEY, None)
            return
        if not callable(callback):
            raise TypeError(
                f"callback_on_step_end must be a LatentGuard, another callback or None, got "
                f"{type(callback).__name__}"
            )
        check_pipeline(pipe)
        for guard in guards_in(callback):
            guard.prepare(pipe)
        # The class may have got a new __call__ since it was made.
        for cls in type(pipe).__mro__:
            if "__call__" in vars(cls) and cls is not object:
                wrap_call(cls)
        vars(pipe)[self.KEY] = callback


def install() -> None:
    """Teach every DiffusionPipeline class, loaded or to come, about guards. Once is enough."""
    import diffusers

    # Any: it gets attributes that its class does not declare.
    DiffusionPipeline: Any = diffusers.DiffusionPipeline
    if isinstance(vars(DiffusionPipeline).get("callback_on_step_end"), StepCallback):
        return
    DiffusionPipeline.callback_on_step_end = StepCallback()

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        super(DiffusionPipeline, cls).__init_subclass__(**kwargs)
        wrap_call(cls)

    DiffusionPipeline.__init_subclass__ = classmethod(init_subclass)
    _carry_over(DiffusionPipeline)
    waiting = [DiffusionPipeline]
    while waiting:
        cls = waiting.pop()
        wrap_call(cls)
        waiting.extend(cls.__subclasses__())


def _carry_over(base: Any) -> None:
    """A pipeline made from a guarded one by `from_pipe` is guarded too."""
    original = vars(base)["from_pipe"].__func__

    @functools.wraps(original)
    def from_pipe(cls: Any, /, pipeline: Any, **kwargs: Any) -> Any:
        made = original(cls, pipeline, **kwargs)
        made.callback_on_step_end = getattr(pipeline, "callback_on_step_end", None)
        return made

    base.from_pipe = classmethod(from_pipe)
