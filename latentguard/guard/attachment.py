"""Which guards a call of a pipeline has, however they were given to it.

`run` stands in for every pipeline's `__call__`. A guard is never overlooked: one in a place where
it would do nothing is an error.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from latentguard.errors import GuardError
from latentguard.guard.arguments import bound, given, replaced
from latentguard.guard.call import GuardedCall
from latentguard.guard.outermost import Outermost
from latentguard.guard.retry import Again, Draws, retried
from latentguard.guard.running import CALLBACK, INPUTS, Marked, current, waiting

if TYPE_CHECKING:
    from latentguard.guard.adapter import LatentGuard
    from latentguard.policy import Policy

_DEPTH = 3

# Pipelines that call a callback, and go on with their own latents whatever it returns.
_IGNORE_ANSWERS = re.compile(r"PRX")


def guards_in(callback: Any) -> list[LatentGuard]:
    """The guards in a callback, which may be one, or a MultiPipelineCallbacks of some."""
    return [part for part in parts(callback) if _is_guard(part)]


def _is_guard(value: Any) -> TypeGuard[LatentGuard]:
    return isinstance(value, Marked)


def guards_of(pipe: Any) -> list[LatentGuard]:
    """The guards of a pipeline's next call, whatever that is given: those which are attached, and
    those of its calls that are running, from a callback of which it may be called again."""
    return [*guards_in(getattr(pipe, CALLBACK, None)), *_running(pipe)]


def _running(pipe: Any) -> list[LatentGuard]:
    calls = [call for call in (current.get(), *waiting.get()) if call is not None]
    return [guard for call in calls if call.pipe is pipe for guard in call.guards]


def parts(callback: Any) -> Iterator[Any]:
    """A callback, or those in a MultiPipelineCallbacks; nothing for None."""
    from diffusers.callbacks import MultiPipelineCallbacks

    if isinstance(callback, MultiPipelineCallbacks):
        for part in callback.callbacks:
            yield from parts(part)
    elif callback is not None:
        yield callback


def holds_guard(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a value is a guard or has one in it: in lists, tuples, sets and dicts too."""
    if guards_in(value) or (isinstance(value, type) and issubclass(value, Marked)):
        return True
    if isinstance(value, Mapping):
        value = list(value.values())
    return (
        depth > 0
        and isinstance(value, list | tuple | set | frozenset)
        and any(holds_guard(item, depth - 1) for item in value)
    )


def check_pipeline(pipe: Any) -> None:
    """Raises GuardError where a pipeline's class has no step callback that sees the latents."""
    name = type(pipe).__name__
    parameters = _parameters(type(pipe))
    missing = [key for key in (CALLBACK, INPUTS) if key not in parameters]
    if missing or "latents" not in getattr(pipe, "_callback_tensor_inputs", ()):
        raise GuardError(
            f"{name} has no {missing[0] if missing else 'latents in its step callback'}, so it "
            "cannot be guarded while it denoises: use output_type='latent' and Scorer, or "
            "latentguard.guard.session in a loop of your own"
        )


def ignores_answers(cls: type) -> bool:
    """Whether a pipeline's class goes on with its own latents whatever a callback returns."""
    return any(_IGNORE_ANSWERS.match(base.__name__) for base in cls.__mro__)


def check_actions(pipe: Any, policy: Policy) -> None:
    """Raises GuardError for a policy that steers, where a pipeline does not let itself steer."""
    steering = [concept.id for concept in policy.concepts if concept.action == "steer"]
    if steering and ignores_answers(type(pipe)):
        raise GuardError(
            f"{type(pipe).__name__} ignores the latents that a step callback returns, so nothing "
            f"can be steered in it, and policy '{policy.name}' steers {', '.join(steering)}: use "
            "a policy whose actions are observe, review or block"
        )


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """Those of `__call__`; of the parent's where a subclass only hands on what it is given."""
    for base in cls.__mro__:
        if "__call__" in vars(base):
            found = inspect.signature(vars(base)["__call__"]).parameters
            if _takes_callbacks(found) or not _hands_on(found):
                return found
    return {}


def _takes_callbacks(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return CALLBACK in parameters and INPUTS in parameters


def _hands_on(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def run(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    """What a pipeline's `__call__` does once latentguard is imported."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):  # of a base that is not for pipelines alone
        return original(pipe, *args, **kwargs)
    outer = current.get()
    inside = outer is not None and outer.pipe is pipe
    if inside and outer.enters(original):
        with outer.entering(original):
            return original(pipe, *args, **kwargs)  # a subclass calls its parent
    attached = getattr(pipe, CALLBACK, None)
    guarded = attached is not None or inside or bool(_running(pipe))
    if not guarded and not holds_guard([*args, *kwargs.values()]):
        _tell_of_idle(pipe)
        return original(pipe, *args, **kwargs)
    if not (isinstance(outer, Outermost) and outer.again):  # which repeats a call that is told of
        for guard in [g for value in (attached, *args, *kwargs.values()) for g in guards_in(value)]:
            guard._forget()
    signature = inspect.signature(original)
    if not _takes_callbacks(signature.parameters):
        _check_places(type(pipe).__name__, {k: v for k, v in kwargs.items() if k != CALLBACK})
        check_pipeline(pipe)
        own = [guard for value in (*args, kwargs.get(CALLBACK)) for guard in guards_in(value)]
        guards = [*guards_of(pipe), *own]
        return _handed_on(original, pipe, args, kwargs, guards)
    arguments = signature.bind(pipe, *args, **kwargs).arguments
    rest = {k: v for k, v in arguments.items() if k not in (CALLBACK, "self")}
    _check_places(type(pipe).__name__, rest)
    return _guarded(original, pipe, signature, arguments, attached)


def _tell_of_idle(pipe: Any) -> None:
    """Warn of a call without a guard whose pipeline keeps one as an attribute of another name."""
    for name, value in vars(pipe).items():
        if holds_guard(value, 0):
            warnings.warn(
                f"{type(pipe).__name__} keeps a LatentGuard as {name}, and this call is not "
                f"guarded: attach it, pipe.{CALLBACK} = pipe.{name}",
                stacklevel=4,
            )


def _guarded(
    original: Callable[..., Any],
    pipe: Any,
    signature: inspect.Signature,
    arguments: dict[str, Any],
    attached: Any,
) -> Any:
    # A generation within a guarded one is guarded as well.
    callbacks = [*parts(attached), *parts(arguments.get(CALLBACK)), *_running(pipe)]
    guards = list(dict.fromkeys(part for part in callbacks if _is_guard(part)))
    others = [part for part in callbacks if not _is_guard(part)]
    if any(holds_guard(other) for other in others):
        raise GuardError(
            f"{CALLBACK} must be a LatentGuard, another callback, or a MultiPipelineCallbacks of "
            f"some, got {others!r}"
        )
    if guards:
        check_pipeline(pipe)
    outer = current.get()
    within = outer if isinstance(outer, Outermost) and outer.pipe is pipe else None
    if within is not None:  # which ends, and repeats, the whole of it
        again = within.again
        return GuardedCall(pipe, signature, arguments, guards, others, again).run(original)
    draws = _draws(pipe, guards, signature, arguments)
    call = GuardedCall(pipe, signature, arguments, guards, others)

    def repeat(again: Again, generator: Any) -> tuple[GuardedCall, Any]:
        own = replaced(signature, arguments, "generator", generator) or arguments
        other = GuardedCall(pipe, signature, own, guards, others, again)
        return other, _freed(pipe, lambda: other.run(original))

    try:
        output = call.run(original)
        if draws is None:
            return output
        return call.recorded(retried(call, output, draws, repeat))
    finally:
        call.end()


def _draws(
    pipe: Any, guards: list[LatentGuard], signature: inspect.Signature, arguments: dict[str, Any]
) -> Draws | None:
    """What the seeds of repetitions follow from; None where no guard asks for any."""
    if not any(guard._answers.retries for guard in guards):
        return None
    generator, latents = (given(signature, arguments, name) for name in ("generator", "latents"))
    taken = replaced(signature, arguments, "generator", None) is not None
    return Draws(generator, latents, pipe._execution_device, taken)


def _freed(pipe: Any, run: Callable[[], Any]) -> Any:
    """What a repetition gives; one that fails leaves the pipeline as one that returns."""
    try:
        return run()
    except Exception:
        pipe.maybe_free_model_hooks()
        raise


def _check_places(name: str, arguments: Mapping[str, Any]) -> None:
    """No guard where it would do nothing."""
    for key, value in arguments.items():
        if holds_guard(value):
            if key == "kwargs" and isinstance(value, dict):
                _check_places(name, value)
            raise GuardError(f"{name}: give a LatentGuard as {CALLBACK}, not as {key}")


def _handed_on(
    original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any, guards: list[LatentGuard]
) -> Any:
    """A subclass's `__call__` that hands its arguments on: calls inside are the guarded ones."""
    signature, outer = inspect.signature(original), current.get()
    within = outer if isinstance(outer, Outermost) and outer.pipe is pipe else None
    known = list(dict.fromkeys([*(within.given if within is not None else ()), *guards]))
    arguments = signature.bind(pipe, *args, **kwargs).arguments

    def outermost(again: Again | None = None) -> Outermost:
        judging = functools.partial(GuardedCall, pipe, signature, {}, known, [], again)
        return Outermost(pipe, known, judging, again)

    def run_in(here: Outermost, arguments: dict[str, Any]) -> Any:
        handed, token = bound(signature, arguments), current.set(here)
        try:
            return here.finish(original(*handed.args, **handed.kwargs), guards)
        finally:
            current.reset(token)

    def repeat(again: Again, generator: Any) -> tuple[GuardedCall | None, Any]:
        again.rows = None  # calls within may have other images
        own = replaced(signature, arguments, "generator", generator) or arguments
        there = outermost(again)
        made = _freed(pipe, lambda: run_in(there, own))
        return there.judging, made

    here = outermost(None if within is None else within.again)
    draws = None if within is not None else _draws(pipe, known, signature, arguments)
    try:
        output = run_in(here, arguments)
        judging = here.judging
        if draws is None or judging is None or judging.count != judging.count_in(output):
            return output
        return judging.recorded(retried(judging, output, draws, repeat))
    finally:
        if within is not None:
            here.hand_up(within)
        else:
            for call in here.calls:
                call.end()
