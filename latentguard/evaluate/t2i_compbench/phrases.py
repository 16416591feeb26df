"""The noun phrases of a prompt, for each of which BLIP-VQA has a question.

The benchmark takes them from spaCy. Most of its prompts are things joined by "and" ("a green bench
and a blue bowl"), whose phrases are read here. Other sentences need a parser: their phrases stand
in a file, or they are not evaluated.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentguard.errors import UsageError
from latentguard.regular import problem, read_bounded

MAX_PHRASES = 8
"""As the benchmark's evaluator asks at most."""
MAX_WORDS = 5
MAX_BYTES = 64 << 20

_ARTICLES = {"a", "an", "the"}
_SENTENCE = {
    "above", "are", "at", "beside", "behind", "below", "between", "by", "for", "from", "has",
    "have", "holds", "in", "inside", "into", "is", "near", "next", "of", "on", "one", "or", "other",
    "out", "over", "sit", "sits", "sitting", "stand", "standing", "that", "through", "to", "under",
    "was", "were", "which", "while", "with",
}  # fmt: skip
"""Words of which none is part of a plain phrase."""


def phrases_of(prompt: str) -> tuple[str, ...] | None:
    """The things that a prompt joins by "and" or commas; None for another sentence."""
    text = prompt.strip().removesuffix(".")
    parts = [part.strip() for part in re.split(r"\s*,\s+and\s+|\s+and\s+|\s*,\s+", text)]
    split = [half for part in parts for half in part.split(" of ", 1)]
    if not 1 < len(split) <= MAX_PHRASES or not all(map(_plain, split)):
        return None
    # "a black and white cat" is one thing, "a black cat and a cat" are two.
    several = all(_words(part) > 1 for part in parts) or all(map(_begins, parts))
    return tuple(split) if several else None


def _plain(phrase: str) -> bool:
    words = phrase.lower().split()
    return 0 < len(words) <= MAX_WORDS and not (
        set(words[1:]) & _ARTICLES or set(words) & _SENTENCE
    )


def _begins(phrase: str) -> bool:
    return phrase.lower().split()[0] in _ARTICLES and _words(phrase) > 0


def _words(phrase: str) -> int:
    return sum(word not in _ARTICLES for word in phrase.lower().split())


def phrases_of_all(prompts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By prompt, its phrases; prompts that are other sentences are not among them."""
    found = {prompt: phrases_of(prompt) for prompt in prompts}
    return {prompt: phrases for prompt, phrases in found.items() if phrases is not None}


def read_phrases(path: Path, prompts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By prompt, its phrases, from a file that has a line for each prompt: the prompt, a tab, and
    its phrases with tabs between them.

    Raises UsageError for a file that cannot be read, and where a prompt has no line or no phrases.
    """
    try:
        lines = read_bounded(path, MAX_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {problem(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8: {error.reason}") from error
    given = {}
    for line in lines:
        prompt, *phrases = (cell.strip() for cell in line.split("\t"))
        given[prompt] = tuple(phrase for phrase in phrases if phrase)
    for prompt in prompts:
        if not given.get(prompt):
            raise UsageError(f"{path}: has no line with phrases of the prompt {prompt[:80]!r}")
        if len(given[prompt]) > MAX_PHRASES:
            raise UsageError(f"{path}: more than {MAX_PHRASES} phrases of {prompt[:80]!r}")
    return {prompt: given[prompt] for prompt in prompts}


def phrases_sha256(phrases: Mapping[str, Sequence[str]]) -> str:
    """Hex digest of what is asked of each prompt."""
    text = "\n".join("\t".join((prompt, *asked)) for prompt, asked in sorted(phrases.items()))
    return hashlib.sha256(text.encode()).hexdigest()
