"""A pipeline's scheduler and VAE, which report to the guarded call that runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from latentguard.guard.running import current
from latentguard.guard.wrapping import names_of, wrap


def wrap_components(pipe: Any) -> None:
    """Make a pipeline's scheduler and VAE report to the guarded call."""
    if getattr(pipe, "scheduler", None) is not None:  # blocks that only decode have none
        wrap(type(pipe.scheduler), "step", _step)
    wrap(type(pipe), "prepare_latents", _prepare_latents)
    vae = decoder_of(pipe)
    if vae is not None:
        wrap(type(vae), "decode", _decode)


_DECODERS = ("vae", "movq", "vqgan")
"""The components whose `decode` makes images of latents."""


def decoder_of(pipe: Any) -> Any:
    """What makes a pipeline's images, as it was before torch.compile; None where nothing does."""
    found = (getattr(pipe, name, None) for name in _DECODERS)
    vae = next((one for one in found if one is not None), None)
    return getattr(vae, "_orig_mod", vae)


def _step(original: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
    call = current.get()
    if call is None or getattr(call.pipe, "scheduler", None) is not scheduler:
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
