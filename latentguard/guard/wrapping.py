"""Methods of classes that are not ours, wrapped once for each class."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch.nn import Module

MARK = "_latentguard_wrapper"
lock = threading.RLock()


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
    with lock:
        original = vars(owner)[name]
        # A function made with functools.wraps has the attributes of the one that it replaces.
        if not callable(original) or getattr(original, MARK, None) is original:
            return

        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(original, self, args, kwargs)

        setattr(wrapper, MARK, wrapper)
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
