"""Former names, which are understood for one release: each use of one says what to write instead.

`Former` stands for a method or attribute, `former_keywords` for arguments, `former_positions` for
arguments that were once positional, and `former_names` for what a module calls otherwise now.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

UNTIL = "the former name goes in latentguard 0.3"


class Former(property):
    """A method or attribute under its former name: `raw = Former("to_raw")`."""

    def __init__(self, new: str) -> None:
        super().__init__()
        self._new = new
        self._old = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        holder = owner if instance is None else instance
        name = (owner or type(instance)).__name__
        _warn(f"{name}.{self._old} is called {self._new} now")
        return getattr(holder, self._new)


def former_keywords(**names: str) -> Callable[[T], T]:
    """Decorates a function, or a class whose constructor it is: `old="new"` for each argument.

    Giving both names of an argument raises TypeError.
    """

    def decorate(target: T) -> T:
        if isinstance(target, type):
            made: Any = target
            made.__init__ = decorate(made.__init__)
            return target
        said = target.__qualname__.removesuffix(".__init__")

        @functools.wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{said}: {old} is the former name of {new}: give one")
                    _warn(f"{said}: the argument {old} is called {new} now")
                    kwargs[new] = kwargs.pop(old)
            return target(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def former_positions(count: int, *names: str) -> Callable[[T], T]:
    """Decorates a function: arguments beyond `count` that were positional once, by their names."""

    def decorate(target: T) -> T:
        @functools.wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            beyond = args[count:]
            if beyond and len(beyond) <= len(names):
                given = dict(zip(names, beyond, strict=False))
                if not given.keys() & kwargs.keys():
                    listed = ", ".join(f"{name}=..." for name in given)
                    _warn(f"{target.__qualname__} takes {count} arguments by place: write {listed}")
                    return target(*args[:count], **given, **kwargs)
            return target(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def former_names(
    module: str, names: Mapping[str, str], others: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has these names no more: {former: present}.

    others: what gives the module's further names, where it has some that are found when asked for.
    """

    def get(name: str) -> Any:
        if name not in names:
            if others is not None:
                return others(name)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name} is called {names[name]} now")
        return getattr(sys.modules[module], names[name])

    return get


def _warn(sentence: str) -> None:
    """Of the line that called into this file, through however many of its functions."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{sentence}; {UNTIL}", DeprecationWarning, stacklevel=level)
