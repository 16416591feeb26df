"""One prompt for each class, and several images of it."""

from __future__ import annotations

from collections.abc import Sequence

from latentguard.errors import UsageError
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.templates import with_place

PROMPT = "a photo of a {}."
"""The name of a class stands in place of "{}"."""


def asked_of(names: Sequence[str], images: int, seed: int = 0, prompt: str = PROMPT) -> list[Asked]:
    """`images` images of each class, all of different seeds, which are counted up from `seed`.

    Raises UsageError for a prompt without just one "{}" (or "{c}").
    """
    template = with_place(prompt)
    if template is None:
        raise UsageError(
            f"--prompt-template must have one {{}} for the class name, got {prompt!r:.80}"
        )
    return [
        Asked(
            f"{row:05}/{index:04}", row, index, template.replace("{}", name),
            seed + row * images + index,
        )
        for row, name in enumerate(names)
        for index in range(images)
    ]  # fmt: skip
