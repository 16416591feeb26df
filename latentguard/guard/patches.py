"""Where the guard meets diffusers: a few places, wrapped once for each class.

    DiffusionPipeline.callback_on_step_end   an attribute that attaches and detaches
    <pipeline class>.__call__                begins and ends a guarded call
    <scheduler class>.step                   sees the model's output, which x0 is made from
    <pipeline>.prepare_latents, <VAE>.decode see size and noise, and what is decoded in the end
    DiffusionPipeline.progress_bar           notices a loop that runs past the guard
    <class>.from_pipe                        hands the guard on to the pipeline that is made

All of them do what they did before, argument for argument, wherever no guarded call is running in
the same thread (a context variable tells), so that shared components and other threads are left
alone and no instance is changed.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch.nn import Module

from latentguard.errors import LatentsError

_MARK = "_latentguard_wrapper"
_lock = threading.RLock()
current: ContextVar[Any] = ContextVar("latentguard_call", default=None)
"""The guarded call (`latentguard.guard.call.Call`) that runs in this thread, or None."""
waiting: ContextVar[tuple[Any, ...]] = ContextVar("latentguard_waiting", default=())
"""The calls in this thread that wait for a callback of the user's, outermost first."""


def wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, self, args, kwargs)` about the method that `cls` has under `name`, and
    about those of its parents that it may hand on to.

    Each is wrapped where it is defined, so that subclasses share it, and only once: what is seen of
    a class does not depend on which others were wrapped before. The wrapper keeps the original's
    signature, which diffusers inspects.
    """
    for base in cls.__mro__:
        if name in vars(base) and base not in (object, Module):
            _wrap_in(base, name, around)


def _wrap_in(owner: type, name: str, around: Callable[..., Any]) -> None:
    with _lock:
        original = vars(owner)[name]
        # A function made with functools.wraps has the attributes of the one that it replaces.
        if not callable(original) or getattr(original, _MARK, None) is original:
            return

        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(original, self, args, kwargs)

        setattr(wrapper, _MARK, wrapper)
        setattr(owner, name, wrapper)


def names_of(cls: type, method: str, original: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names of the arguments of `cls.method`, self left out.

    A method that only passes on what it is given (*args, **kwargs) has those of the nearest parent
    that names any; the second value is whether `original` names them itself.
    """
    names = _named(original)
    own = bool(names)
    for base in cls.__mro__:
        if not names and method in vars(base):
            names = _named(vars(base)[method])
    return names, own


def _named(function: Any) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in found if parameter.kind in positional][1:]


def wrap_call(cls: type) -> None:
    """Make calls of a pipeline's class honour guards, and those that it has from its bases."""
    from latentguard.guard.attachment import run

    wrap(cls, "__call__", run)


def wrap_components(pipe: Any) -> None:
    """Make a pipeline's scheduler and VAE report to the guarded call."""
    wrap(type(pipe.scheduler), "step", _step)
    wrap(type(pipe), "prepare_latents", _prepare_latents)
    vae = decoder_of(pipe)
    if vae is not None:
        wrap(type(vae), "decode", _decode)


def decoder_of(pipe: Any) -> Any:
    """A pipeline's VAE, as it was before torch.compile; None where it has none."""
    vae = getattr(pipe, "vae", None)
    return getattr(vae, "_orig_mod", vae)


def _step(original: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    call = current.get()
    if call is None or call.pipe.scheduler is not scheduler:
        return original(scheduler, *args, **kwargs)
    return call.scheduler_step(original, scheduler, args, kwargs)


def _prepare_latents(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    call = current.get()
    if call is None or call.pipe is not pipe:
        return original(pipe, *args, **kwargs)
    call.saw_size(inspect.signature(original).bind(pipe, *args, **kwargs).arguments)
    prepared = original(pipe, *args, **kwargs)
    call.saw_first(prepared)
    return prepared


def _decode(original: Callable[..., Any], vae: Any, args: Any, kwargs: Any) -> Any:
    call = current.get()
    if call is None or decoder_of(call.pipe) is not vae:
        return original(vae, *args, **kwargs)
    if args:
        return original(vae, call.before_decode(args[0]), *args[1:], **kwargs)
    names, _ = names_of(type(vae), "decode", original)
    given = {name: call.before_decode(kwargs[name]) for name in names[:1] if name in kwargs}
    return original(vae, **{**kwargs, **given})


def _loop(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    """`progress_bar`, which every denoising loop of diffusers begins with."""
    from latentguard.guard.attachment import guards_of

    call = current.get()
    inside = call is not None and call.pipe is pipe and call.begins_loop()
    if not inside and guards_of(pipe):
        raise LatentsError(
            f"a guard is attached to this {type(pipe).__name__}, but its loop runs outside of a "
            "guarded call (was __call__ replaced or unwrapped?): attach the guard again, or "
            f"detach it ({StepCallback.NAME} = None) and use latentguard.guard.session"
        )
    return original(pipe, *args, **kwargs)


def _set(
    original: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`__setattr__`: a guard under another name would do nothing, nor one that is not kept."""
    from latentguard.guard.attachment import holds_guard

    name, value = (*args, *kwargs.values())
    elsewhere = ("callback" in name and name != StepCallback.NAME) or name == "safety_checker"
    if elsewhere and holds_guard(value):
        raise LatentsError(
            f"{type(pipe).__name__}: attach a LatentGuard as {StepCallback.NAME}, not as {name}"
        )
    result = original(pipe, *args, **kwargs)
    if name == StepCallback.NAME and getattr(pipe, name, None) is not value:
        raise LatentsError(
            f"{type(pipe).__name__} has a {name} of its own that does not keep what it is given, "
            f"so nothing can be attached to it: give it in the call ({name}=...)"
        )
    return result


class StepCallback:
    """The attribute `callback_on_step_end` of every pipeline: a guard, a callback, or None."""

    NAME = "callback_on_step_end"

    def __get__(self, pipe: Any, owner: type | None = None) -> Any:
        return self if pipe is None else vars(pipe).get(self.NAME)

    def __set__(self, pipe: Any, callback: Any) -> None:
        from latentguard.guard.attachment import check_pipeline, guards_in

        if callback is None:
            vars(pipe).pop(self.NAME, None)
            return
        if not callable(callback) or isinstance(callback, type):
            raise TypeError(
                f"{self.NAME} must be a LatentGuard, another callback or None, got "
                f"{callback.__name__ if isinstance(callback, type) else type(callback).__name__}"
            )
        check_pipeline(pipe)
        for guard in guards_in(callback):
            guard.prepare(pipe)
        wrap_call(type(pipe))  # which may have got a new __call__ since it was made
        vars(pipe)[self.NAME] = callback


class _NoStepCallback(StepCallback):
    """Of classes that are no DiffusionPipeline: a guard would never be called there."""

    def __set__(self, pipe: Any, callback: Any) -> None:
        from latentguard.guard.attachment import holds_guard

        if holds_guard(callback):
            raise LatentsError(_cannot(pipe))
        vars(pipe)[self.NAME] = callback


def _refuse(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    from latentguard.guard.attachment import holds_guard

    if holds_guard([*args, *kwargs.values()]):
        raise LatentsError(_cannot(pipe))
    return original(pipe, *args, **kwargs)


def _cannot(pipe: Any) -> str:
    return (
        f"{type(pipe).__name__} has no {StepCallback.NAME}, so it cannot be guarded: take its "
        "latents and use Scorer, or latentguard.guard.session in a loop of your own"
    )


def install() -> None:
    """Teach every pipeline class, loaded or to come, about guards. Once is enough."""
    import diffusers
    from diffusers.configuration_utils import ConfigMixin

    # Any: it gets attributes that its class does not declare.
    DiffusionPipeline: Any = diffusers.DiffusionPipeline
    with _lock:
        if isinstance(vars(DiffusionPipeline).get(StepCallback.NAME), StepCallback):
            return
        DiffusionPipeline.callback_on_step_end = StepCallback()
        wrap(DiffusionPipeline, "__setattr__", _set)
        wrap(DiffusionPipeline, "progress_bar", _loop)

        # The classes that matter are loaded when they are first used, and all are ConfigMixins.
        def init_subclass(cls: Any, /, **kwargs: Any) -> None:
            super(ConfigMixin, cls).__init_subclass__(**kwargs)
            _teach(cls)

        base: Any = ConfigMixin
        base.__init_subclass__ = classmethod(init_subclass)
        waiting: list[Any] = [ConfigMixin]
        while waiting:
            cls = waiting.pop()
            _teach(cls)
            waiting.extend(cls.__subclasses__())


def _teach(cls: Any) -> None:
    import diffusers

    if "from_pipe" in vars(cls):  # DiffusionPipeline, and the AutoPipelines
        _carry_over(cls)
    if issubclass(cls, diffusers.DiffusionPipeline):
        wrap_call(cls)
    elif cls.__name__ == "ModularPipeline":
        cls.callback_on_step_end = _NoStepCallback()
        wrap(cls, "__call__", _refuse)


def _carry_over(cls: Any) -> None:
    """A pipeline made from a guarded one by `from_pipe` is guarded too."""
    original = vars(cls)["from_pipe"].__func__
    if getattr(original, _MARK, None) is original:
        return

    @functools.wraps(original)
    def from_pipe(cls: Any, /, pipeline: Any, **kwargs: Any) -> Any:
        made = original(cls, pipeline, **kwargs)
        attached = getattr(pipeline, StepCallback.NAME, None)
        if attached is not None:
            made.callback_on_step_end = attached
        return made

    setattr(from_pipe, _MARK, from_pipe)
    cls.from_pipe = classmethod(from_pipe)
