"""The structures that operators' arguments come in, and their flat form.

A torch schema is a flat list of arguments. Python code passes what belongs together as one
structure; `flat` makes a function of structures one of flat arguments, `text` writes a structure
into a schema. csrc/ops has the same structures in C++.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_type_hints

from torch import Tensor

Result = TypeVar("Result")


class Conversion(NamedTuple):
    """The optional end of patch_embed: x = (latents - sigma * noise) / alpha * scale + shift.

    scale, shift: [C], or [4C] over 2x2-packed channels; noise: like the latents; alpha, sigma: [B].
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    noise: Tensor | None = None
    alpha: Tensor | None = None
    sigma: Tensor | None = None


class Head(NamedTuple):
    """From features to the joint space: a layer norm [D], a projection [D, E], either optional."""

    ln_weight: Tensor | None
    ln_bias: Tensor | None
    eps: float
    projection: Tensor | None


class Bank(NamedTuple):
    """Embedded prompts [P, E] and contrast prompts [Q, E], with each concept's ranges [K, 2]."""

    concepts: Tensor
    segments: Tensor
    contrast: Tensor
    contrast_segments: Tensor


class Weights(NamedTuple):
    """What a backward reads of a head and a bank."""

    ln_weight: Tensor | None
    eps: float
    projection: Tensor | None
    concepts: Tensor
    contrast: Tensor


class Saved(NamedTuple):
    """What a forward keeps for its backward: each bank's best rows, the projected features."""

    best_prompt: Tensor
    best_contrast: Tensor
    projected: Tensor


Structure = type[Conversion] | type[Head] | type[Bank] | type[Weights] | type[Saved]
_TYPES: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float"}


def text(structure: Structure) -> str:
    """The structure's fields as a schema names them: "Tensor? ln_weight, ..., float eps"."""
    return ", ".join(
        f"{_TYPES[kind]} {name}" + ("=None" if name in structure._field_defaults else "")
        for name, kind in get_type_hints(structure).items()
    )


def flat(function: Callable[..., Result]) -> Callable[..., Result]:
    """The same function, called with the fields of its structures in their place.

    A function without structures is returned as it is. What a schema leaves out at the end keeps
    the defaults of the structure or of the function.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    structures = {n: p.annotation for n, p in parameters.items() if _is_structure(p.annotation)}
    if not structures:
        return function
    spread = [f for p in parameters.values() for f in _spread(p)]
    names = [parameter.name for parameter in spread]

    def call(*args: Any, **kwargs: Any) -> Result:
        if len(args) > len(names):
            raise TypeError(f"{function.__name__}: {len(args)} arguments for {', '.join(names)}")
        given = dict(zip(names, args, strict=False)) | kwargs
        for parameter, structure in structures.items():
            fields = {name: given.pop(name) for name in structure._fields if name in given}
            given[parameter] = structure(**fields)
        return function(**given)

    # Whoever looks at the signature (torch.onnx does) sees the flat one.
    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return call


def _is_structure(annotation: Any) -> bool:
    return hasattr(annotation, "_fields")


def _spread(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """A parameter, or those that the fields of its structure are."""
    structure = parameter.annotation
    if not _is_structure(structure):
        return [parameter]
    return [
        inspect.Parameter(
            name,
            parameter.kind,
            default=structure._field_defaults.get(name, inspect.Parameter.empty),
            annotation=float if kind is float else Any,
        )
        for name, kind in get_type_hints(structure).items()
    ]
