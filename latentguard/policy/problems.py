"""What is wrong with a policy or lock file, as sentences that name file, line and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from latentguard.policy.fields import PATTERNS, SCHEMA_VERSION, without_tags
from latentguard.yaml_nodes import Node, Problem, clip, line_of, problems_error, show

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], node: Node, source: str, what: str) -> Model:
    """`node` as a validated `model`. Raises PolicyError with one sentence and line per problem.

    what: the name of the whole document in a message about it, such as "a policy".
    """
    _check_version(node, source)
    try:
        return model.model_validate(node.plain())
    except ValidationError as error:
        problems = [
            _problem(model, node, what, detail) for detail in error.errors(include_url=False)
        ]
        raise problems_error(source, problems) from error


def _check_version(node: Node, source: str) -> None:
    """Under another schema_version the rest may mean anything, so nothing else is said of it."""
    version = node.value.get("schema_version") if isinstance(node.value, dict) else None
    if version is None or (type(version.value) is int and version.value == SCHEMA_VERSION):
        return
    sentence = (
        f"schema_version must be {SCHEMA_VERSION}, the only one known here, "
        f"got {show(version.plain())}"
    )
    raise problems_error(source, [(line_of(node, ["schema_version"]), sentence)])


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely meant, or None."""
    found = difflib.get_close_matches(word[:100].lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _path(loc: Iterable[int | str]) -> str:
    path = ""
    for step in loc:
        path += f"[{step}]" if isinstance(step, int) else f".{clip(step)}"
    return path.removeprefix(".")


def _model_at(model: type[BaseModel], loc: Iterable[int | str]) -> type[BaseModel] | None:
    """The model whose fields `loc` names, found through the annotations of the fields."""
    for step in loc:
        if isinstance(step, int):
            continue
        info = model.model_fields.get(step)
        inner = next(_models_in(info.annotation), None) if info else None
        if inner is None:
            return None
        model = inner
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _range(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    """The numbers that the field at `loc` takes, as its JSON Schema gives them."""
    owner = _model_at(model, loc[:-1])
    assert owner is not None  # a number stands in a model
    schema = owner.model_json_schema()["properties"][loc[-1]]
    number = schema.get("anyOf", [schema])[0]
    if number["type"] == "integer":
        return f"a whole number from {number['minimum']} to {number['maximum']}"
    if "minimum" in number:
        return f"between {number['minimum']:g} and {number['maximum']:g}"
    return f"above {number['exclusiveMinimum']:g} and below {number['exclusiveMaximum']:g}"


def _problem(model: type[BaseModel], root: Node, what: str, detail: Any) -> Problem:
    """pydantic's description of one error as a line and a sentence."""
    loc: tuple[int | str, ...] = without_tags(detail["loc"])
    context = detail.get("ctx", {})
    loc += tuple(context.get("at", ()))
    name = _path(loc) or what
    got = show(detail["input"])
    sentence = f"{name} {detail['msg'][:1].lower()}{detail['msg'][1:]}, got {got}"
    match detail["type"]:
        case "rule":  # raised by our own validators as a whole sentence
            sentence = f"{name} {detail['msg']}"
        case "value_error":
            sentence = f"{name} {context['error']}, got {got}"
        case "missing":
            sentence = f"{name} is missing"
        case "extra_forbidden":
            owner = _model_at(model, loc[:-1])
            known = list(owner.model_fields) if owner else []
            near = closest(str(loc[-1]), known)
            hint = f"did you mean '{near}'?" if near else f"known keys: {', '.join(known)}"
            sentence = f"{name} is not a known key; {hint}"
        case "float_type":
            sentence = f"{name} must be a number, got {got}"
        case (
            "int_type"
            | "greater_than"
            | "greater_than_equal"
            | "less_than"
            | "less_than_equal"
            | "finite_number"
        ):
            sentence = f"{name} must be {_range(model, loc)}, got {got}"
        case "string_pattern_mismatch":
            sentence = f"{name} {PATTERNS[context['pattern']]}, got {got}"
        case "string_too_long":
            sentence = f"{name} must be at most {context['max_length']} characters long, got {got}"
        case "string_type" | "string_unicode":
            quotes = isinstance(detail["input"], bool | int | float)
            sentence = f"{name} must be text, got {got}{'; put it in quotes' if quotes else ''}"
        case "tuple_type":
            sentence = f"{name} must be a list, got {got}"
        case "model_type" | "model_attributes_type":
            sentence = f"{name} must be a mapping of keys, got {got}"
        case "literal_error":
            options = re.findall(r"'([^']*)'", context["expected"])
            value = detail["input"]
            near = closest(value, options) if isinstance(value, str) else None
            hint = f"; did you mean '{near}'?" if near else ""
            sentence = f"{name} must be {context['expected']}, got {got}{hint}"
    return line_of(root, loc), sentence
