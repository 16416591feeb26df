"""Arguments of a pipeline's call by their names, among its **kwargs too."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def given(signature: inspect.Signature, arguments: Mapping[str, Any], name: str) -> Any:
    """The argument `name` of a call; its default where it was not given, None without one.

    arguments: as `signature.bind` gave them.
    """
    parameters = signature.parameters
    if name in arguments:
        return arguments[name]
    for parameter in parameters.values():
        rest = arguments.get(parameter.name)
        if parameter.kind is parameter.VAR_KEYWORD and rest is not None and name in rest:
            return rest[name]
    default = parameters[name].default if name in parameters else None
    return None if default is inspect.Parameter.empty else default


def replaced(
    signature: inspect.Signature, arguments: Mapping[str, Any], name: str, value: Any
) -> dict[str, Any] | None:
    """The arguments of a call with another one under `name`; None where it takes none of it."""
    if name in signature.parameters:
        return {**arguments, name: value}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = arguments.get(parameter.name) or {}
            return {**arguments, parameter.name: {**rest, name: value}}
    return None


def bound(signature: inspect.Signature, arguments: Mapping[str, Any]) -> inspect.BoundArguments:
    """Arguments as they are handed over: BoundArguments takes them in the signature's order."""
    names = [name for name in signature.parameters if name in arguments]
    return inspect.BoundArguments(signature, {name: arguments[name] for name in names})
