"""Where the guard meets diffusers: a few places, wrapped once for each class.

    DiffusionPipeline.callback_on_step_end   an attribute that attaches and detaches
    <pipeline class>.__call__                begins and ends a guarded call
    <scheduler class>.step                   sees the model's output, which x0 is made from
    <pipeline>.prepare_latents, <VAE>.decode see size and noise, and what is decoded in the end
    DiffusionPipeline.progress_bar           notices a loop that runs past the guard
    <class>.from_pipe                        hands the guard on to the pipeline that is made
    ModularPipeline.__call__                 begins and ends a call whose blocks hold a guard
    ModularPipeline, its blocks              refuse a guard where it would do nothing

All of them do what they did before, argument for argument, wherever no guarded call is running in
the same thread (a context variable tells), so that shared components and other threads are left
alone and no instance is changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from latentguard.errors import GuardError
from latentguard.guard.attachment import check_pipeline, guards_in, guards_of, holds_guard, run
from latentguard.guard.probe import check_diffusers
from latentguard.guard.running import CALLBACK, INTO_BLOCKS, current
from latentguard.guard.wrapping import MARK, lock, wrap


def wrap_call(cls: type) -> None:
    """Make calls of a pipeline's class honor guards, and those that it has from its bases."""
    wrap(cls, "__call__", run)


def _loop(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    """`progress_bar`, which every denoising loop of diffusers begins with."""
    call = current.get()
    inside = call is not None and call.pipe is pipe and call.begins_loop()
    if not inside and guards_of(pipe):
        raise GuardError(
            f"a guard is attached to this {type(pipe).__name__}, but its loop runs outside of a "
            "guarded call (was __call__ replaced or unwrapped?): attach the guard again, or "
            f"detach it ({CALLBACK} = None) and use latentguard.guard.session"
        )
    return original(pipe, *args, **kwargs)


def _set(
    original: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`__setattr__`: a guard under another name would do nothing, nor one that is not kept."""
    name, value = (*args, *kwargs.values())
    elsewhere = ("callback" in name and name != CALLBACK) or name == "safety_checker"
    if elsewhere and holds_guard(value):
        raise GuardError(
            f"{type(pipe).__name__}: attach a LatentGuard as {CALLBACK}, not as {name}"
        )
    result = original(pipe, *args, **kwargs)
    if name == CALLBACK and getattr(pipe, name, None) is not value:
        raise GuardError(
            f"{type(pipe).__name__} has a {name} of its own that does not keep what it is given, "
            f"so nothing can be attached to it: give it in the call ({name}=...)"
        )
    return result


class StepCallback:
    """The attribute `callback_on_step_end` of every pipeline: a guard, a callback, or None."""

    def __get__(self, pipe: Any, owner: type | None = None) -> Any:
        return self if pipe is None else vars(pipe).get(CALLBACK)

    def __set__(self, pipe: Any, callback: Any) -> None:
        if callback is None:
            vars(pipe).pop(CALLBACK, None)
            return
        if not callable(callback) or isinstance(callback, type):
            raise TypeError(
                f"{CALLBACK} must be a LatentGuard, another callback or None, got "
                f"{callback.__name__ if isinstance(callback, type) else type(callback).__name__}"
            )
        check_pipeline(pipe)
        for guard in guards_in(callback):
            guard._prepare(pipe)
        wrap_call(type(pipe))  # which may have got a new __call__ since it was made
        vars(pipe)[CALLBACK] = callback


class _NoStepCallback(StepCallback):
    """Of modular pipelines, which call no callback, and refuse guards as attributes."""

    def __set__(self, pipe: Any, callback: Any) -> None:
        vars(pipe)[CALLBACK] = callback


def _run_blocks(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    from latentguard.guard.modular import run  # which needs what is being loaded at install

    return run(original, pipe, args, kwargs)


def _take(original: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    """Functions that take components or attributes, of which a guard is none."""
    _refuse(owner, [*args, *kwargs.values()])
    return original(owner, *args, **kwargs)


def _refuse_attributes(cls: Any) -> None:
    """Make a class, which sets its attributes as its parents do, refuse guards among them."""

    def set_attribute(owner: Any, name: str, value: Any) -> None:
        _refuse(owner, value)
        super(cls, owner).__setattr__(name, value)

    cls.__setattr__ = set_attribute


def _refuse(owner: Any, value: Any) -> None:
    if holds_guard(value):
        raise GuardError(
            "a LatentGuard does nothing as an attribute, a component or a callback of a "
            f"{type(owner).__name__}: {INTO_BLOCKS}"
        )


def install() -> None:
    """Teach every pipeline class, loaded or to come, about guards. Once is enough.

    Raises GuardError where this diffusers lacks a place that a guard hooks into.
    """
    import diffusers
    from diffusers.configuration_utils import ConfigMixin

    check_diffusers(diffusers)

    # Any: it gets attributes that its class does not declare.
    DiffusionPipeline: Any = diffusers.DiffusionPipeline
    with lock:
        if isinstance(vars(DiffusionPipeline).get(CALLBACK), StepCallback):
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
        _teach_modular(cls)
    elif cls.__name__ == "ModularPipelineBlocks":
        _refuse_attributes(cls)


def _teach_modular(cls: Any) -> None:
    """`cls` is diffusers' ModularPipeline, by the module of which its manager is loaded."""
    cls.callback_on_step_end = _NoStepCallback()
    _refuse_attributes(cls)
    wrap(cls, "__call__", _run_blocks)
    for name in ("update_components", "register_components"):
        wrap(cls, name, _take)
    manager = getattr(sys.modules[cls.__module__], "ComponentsManager", None)
    if manager is not None:
        wrap(manager, "add", _take)


def _carry_over(cls: Any) -> None:
    """A pipeline made from a guarded one by `from_pipe` is guarded too."""
    original = vars(cls)["from_pipe"].__func__
    if getattr(original, MARK, None) is original:
        return

    @functools.wraps(original)
    def from_pipe(cls: Any, /, pipeline: Any, **kwargs: Any) -> Any:
        made = original(cls, pipeline, **kwargs)
        attached = getattr(pipeline, CALLBACK, None)
        if attached is not None:
            made.callback_on_step_end = attached
        return made

    setattr(from_pipe, MARK, from_pipe)
    cls.from_pipe = classmethod(from_pipe)
