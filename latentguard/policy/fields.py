"""The fields of policies and locks: each type says what it accepts, in one sentence where it does
not, and in JSON Schema for editors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from latentguard.policy.yaml_nodes import show
from latentguard.text import unseen

SCHEMA_VERSION = 1

MAX_PROMPT = 300
"""Characters of a prompt: more than CLIP's 77 tokens can hold."""


class Frozen(BaseModel):
    """Data that does not change and refuses keys it does not know."""

    # The docstrings under attributes are what editors show, by way of the JSON Schema.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def rule(sentence: str, *at: int | str) -> PydanticCustomError:
    """A broken rule as a whole sentence about the value at `at`, seen from the validated field."""
    return PydanticCustomError("rule", "{sentence}", {"sentence": sentence, "at": at})


def _line(limit: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        text = text.strip()
        if not text:
            raise ValueError("must not be empty")
        if len(text) > limit:
            raise ValueError(f"must be at most {limit} characters long")
        if not text.isprintable():
            raise ValueError("must be one line of printable text")
        return text

    return check


def _label(text: str) -> str:
    """A name, by which people tell policies apart: nothing in it is unseen."""
    text = _line(200)(text)
    hidden = unseen(text)
    if hidden is not None:
        raise ValueError(f"must hold no character that cannot be seen, it holds {hidden}")
    return text


def _paragraphs(text: str) -> str:
    text = text.strip()
    if len(text) > 4000:
        raise ValueError("must be at most 4000 characters long")
    if not text.replace("\n", " ").isprintable():
        raise ValueError("must be printable text")
    return text


def _slug(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", text):
        raise ValueError(
            "must be 1 to 64 of a-z, 0-9, '-' and '_', beginning with a letter or digit"
        )
    return text


def _template(text: str) -> str:
    text = _line(MAX_PROMPT)(text)
    if text.count("{}") != 1:
        raise ValueError('must hold "{}" exactly once, where the prompt goes')
    return text


def _number(value: Any) -> float:
    """Only real numbers: pydantic alone would also take "0.5" and true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return float(value) if abs(value) < 1e300 else math.copysign(math.inf, value)


def _between(low: float, high: float) -> Callable[[float], float]:
    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"must be between {low:g} and {high:g}")
        return value

    return check


def _inside(low: float, high: float) -> Callable[[float], float]:
    def check(value: float) -> float:
        if not low < value < high:
            raise ValueError(f"must be above {low:g} and below {high:g}")
        return value

    return check


def _every(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
        raise ValueError("must be a whole number from 1 to 1000")
    return value


def _iterations(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
        raise ValueError("must be a whole number from 1 to 100")
    return value


def _window(value: Any) -> tuple[float, float | None]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("must be a list of two noise levels, [low, high]")
    low, high = value
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float | None):
            raise ValueError("must be two numbers; only the upper may be null, for no upper end")
    if low is None or not 0 <= low < 1e300:
        raise ValueError(f"must begin at 0 or above, not at {show(low)}")
    if high is not None and not high < 1e300:
        raise ValueError(f"must end at a number, or null for no upper end, not at {high!r}")
    if high is not None and high < low:
        raise ValueError(f"must not end ({high:g}) below its beginning ({low:g})")
    return float(low), None if high is None else float(high)


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("must be a SHA-256 digest, 64 hexadecimal digits in lower case")
    return text


def _filled(value: Any) -> Any:
    # Not pydantic's min_length: it also complains of lists whose items are all wrong.
    if isinstance(value, list | tuple) and not value:
        raise ValueError("must not be empty")
    return value


def _text_schema(limit: int, **more: Any) -> WithJsonSchema:
    # \S: something that is not white space; the control characters are left to the loader.
    return WithJsonSchema({"type": "string", "pattern": r"\S", "maxLength": limit, **more})


Items = TypeVar("Items")
Filled = Annotated[Items, BeforeValidator(_filled), Field(json_schema_extra={"minItems": 1})]
Slug = Annotated[
    str,
    AfterValidator(_slug),
    WithJsonSchema({"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]{0,63}$"}),
]
Label = Annotated[str, AfterValidator(_label), _text_schema(200)]
Prompt = Annotated[str, AfterValidator(_line(MAX_PROMPT)), _text_schema(MAX_PROMPT)]
Template = Annotated[
    str,
    AfterValidator(_template),
    _text_schema(MAX_PROMPT, pattern=r"^(?!.*\{\}.*\{\}).*\{\}"),
]
Description = Annotated[
    str, AfterValidator(_paragraphs), WithJsonSchema({"type": "string", "maxLength": 4000})
]
Digest = Annotated[
    str,
    AfterValidator(_sha256),
    WithJsonSchema({"type": "string", "pattern": "^[0-9a-f]{64}$"}),
]
Number = Annotated[float, BeforeValidator(_number)]
Probability = Annotated[
    Number,
    AfterValidator(_between(0, 1)),
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1}),
]
Margin = Annotated[
    Number,
    AfterValidator(_between(-2, 2)),
    WithJsonSchema({"type": "number", "minimum": -2, "maximum": 2}),
]
Band = Annotated[
    Number,
    AfterValidator(_between(0, 2)),
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": 2}),
]
Rate = Annotated[
    Number,
    AfterValidator(_inside(0, 1)),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
]
Strength = Annotated[
    Number,
    AfterValidator(_inside(0, 100)),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100}),
]
NoiseLevel = Annotated[
    Number,
    AfterValidator(_between(0, 1e6)),
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1e6}),
]
Every = Annotated[
    int,
    BeforeValidator(_every),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 1000}),
]
Iterations = Annotated[
    int,
    BeforeValidator(_iterations),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 100}),
]
NoiseWindow = Annotated[
    tuple[float, float | None],
    BeforeValidator(_window),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": ["number", "null"], "minimum": 0},
            "minItems": 2,
            "maxItems": 2,
        }
    ),
]
