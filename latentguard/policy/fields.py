"""The fields of policies and locks: each type says what it accepts, in one sentence where it does
not, and in JSON Schema for editors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from latentguard.text import unseen
from latentguard.yaml_nodes import show

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


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable text")
    return text


def _seen(text: str) -> str:
    """A name, by which people tell policies apart: nothing in it is unseen."""
    hidden = unseen(text)
    if hidden is not None:
        raise ValueError(f"must hold no character that cannot be seen, it holds {hidden}")
    return text


def _paragraphs(text: str) -> str:
    if not text.replace("\n", " ").isprintable():
        raise ValueError("must be printable text")
    return text


def _template(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError('must hold "{}" exactly once, where the prompt goes')
    return text


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


def _beneath(text: str) -> str:
    """A path that leads nowhere but into the folder that it is taken from, on every system."""
    for path in (PurePosixPath(text), PureWindowsPath(text)):
        if path.drive or path.root or ".." in path.parts:
            raise ValueError("must be the path of a file in the policy's folder or below it")
    return text


WORD, SETTINGS = "word", "settings"


def tag_of(value: Any) -> Literal["word", "settings"]:
    """Which form a value has that is a word, or a mapping of a word to its settings."""
    return "settings" if isinstance(value, Mapping | BaseModel) else "word"


def without_tags(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where an error is, without the form that pydantic puts behind the key of such a value."""
    return (*loc[:1], *loc[2:]) if loc[:1] == ("on_block",) else loc


def _filled(value: Any) -> Any:
    # Not pydantic's min_length: it also complains of lists whose items are all wrong.
    if isinstance(value, list | tuple) and not value:
        raise ValueError("must not be empty")
    return value


_FILLED = r"\S"
_SLUG = "^[a-z0-9][a-z0-9_-]{0,63}$"
_DIGEST = "^[0-9a-f]{64}$"
PATTERNS = {
    _FILLED: "must not be empty",
    _SLUG: "must be 1 to 64 of a-z, 0-9, '-' and '_', beginning with a letter or digit",
    _DIGEST: "must be a SHA-256 digest, 64 hexadecimal digits in lower case",
}
"""What is said of text that a pattern does not match."""


def _line(limit: int) -> StringConstraints:
    return StringConstraints(strict=True, strip_whitespace=True, pattern=_FILLED, max_length=limit)


Items = TypeVar("Items")
Filled = Annotated[Items, BeforeValidator(_filled), Field(json_schema_extra={"minItems": 1})]
Slug = Annotated[str, StringConstraints(strict=True, pattern=_SLUG)]
Digest = Annotated[str, StringConstraints(strict=True, pattern=_DIGEST)]
Label = Annotated[str, _line(200), AfterValidator(_printable), AfterValidator(_seen)]
Prompt = Annotated[str, _line(MAX_PROMPT), AfterValidator(_printable)]
Template = Annotated[
    Prompt,
    AfterValidator(_template),
    Field(json_schema_extra={"pattern": r"^(?!.*\{\}.*\{\}).*\{\}"}),
]
Description = Annotated[
    str,
    StringConstraints(strict=True, strip_whitespace=True, max_length=4000),
    AfterValidator(_paragraphs),
]
Probability = Annotated[float, Field(strict=True, ge=0, le=1)]
Margin = Annotated[float, Field(strict=True, ge=-2, le=2)]
Band = Annotated[float, Field(strict=True, ge=0, le=2)]
Rate = Annotated[float, Field(strict=True, gt=0, lt=1)]
Strength = Annotated[float, Field(strict=True, gt=0, lt=100)]
NoiseLevel = Annotated[float, Field(strict=True, ge=0, le=1e6)]
Attempts = Annotated[int, Field(strict=True, ge=1, le=20)]
PicturePath = Annotated[Label, AfterValidator(_beneath)]
Every = Annotated[int, Field(strict=True, ge=1, le=1000)]
Iterations = Annotated[int, Field(strict=True, ge=1, le=100)]
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
