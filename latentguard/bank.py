"""A policy's prompts as a model embeds them: the rows that the concept bank is made of.

NumPy alone, as judging without torch needs them, too.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from latentguard.coverage import Coverage, check_coverage

if TYPE_CHECKING:
    from latentguard.policy import Policy
    from latentguard.policy.examples import ConceptFile

Floats = NDArray[np.float32]
Whole = NDArray[np.int32]


class TextSide(Protocol):
    """What a bank asks of a model: its texts, and what it knows of them.

    text_norm: of the rows of `encode_text`. The rest as in `latentguard.encoders.Encoder`.
    """

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def text_norm(self) -> float: ...
    @property
    def min_coverage(self) -> float: ...
    @property
    def neutral_prompts(self) -> tuple[str, ...]: ...
    @property
    def always_neutral(self) -> bool: ...
    @property
    def uses_templates(self) -> bool: ...

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """Rows [P, dim]."""

    def coverage(self, texts: Sequence[str]) -> Floats:
        """How much [P] of each text the model sees, 0 to 1."""

    def check_learned(self, file: ConceptFile) -> None:
        """Raise ModelError where nothing was learned for this model, PolicyError where it is of
        other features."""

    def learned_row(self, file: ConceptFile, contrast: Floats) -> Floats:
        """The row [dim] of what was learned for this model; `contrast` [n, dim] is what its concept
        is compared with. Raises as `check_learned`."""


@dataclass(frozen=True)
class BankRows:
    """The rows of K concepts and their contrast, and what the model sees of them.

    The fields are those of `latentguard.concepts.ConceptBank`, where they are explained.
    """

    prompts: tuple[str, ...]
    embeddings: Floats
    segments: Whole
    contrast: Floats
    contrast_segments: Whole
    coverage: tuple[float, ...]
    seen: tuple[bool, ...]
    covered: tuple[bool, ...]
    unseen_contrast: tuple[str, ...] = ()

    @classmethod
    def build(cls, policy: Policy, text: TextSide) -> BankRows:
        """Bind a policy to a model's text side. Raises as `ConceptBank.build`."""
        labels = [policy.labels_of(concept) for concept in policy.concepts]
        prompts = tuple(label for some in labels for label in some)
        found = coverage_of(policy, text)
        check_coverage(policy, text.name, found)
        seen = tuple(flag for concept in found for flag in concept.seen)
        hidden = dict.fromkeys(label for concept in found for label, _ in concept.unseen_contrast)
        contrast, ranges = _contrast(policy, text, hidden)
        rows = _rows(policy, text, [contrast[begin:end] for begin, end in ranges])
        return cls(
            prompts,
            rows * np.asarray(seen, np.float32)[:, None],
            np.asarray(_ranges([len(some) for some in labels]), np.int32),
            contrast,
            np.asarray(ranges, np.int32),
            tuple(value for concept in found for _, value in concept.prompts),
            seen,
            tuple(any(concept.seen) for concept in found),
            tuple(hidden),
        )


def coverage_of(policy: Policy, text: TextSide) -> list[Coverage]:
    """What a model sees of each concept, prompt by prompt; examples it sees.

    Raises as `TextSide.check_learned`.
    """
    contrast = {concept.id: policy.contrast_of(concept) for concept in policy.concepts}
    texts = [prompt for concept in policy.concepts for prompt in concept.prompts]
    texts += [prompt for prompts in contrast.values() for prompt in prompts]
    texts = list(dict.fromkeys(texts))
    found = text.coverage(texts).tolist() if texts else []
    numbers: dict[str, float] = dict(zip(texts, found, strict=True))
    for concept in policy.concepts:
        file = policy.examples_of(concept)
        if file is not None:
            text.check_learned(file)
            numbers[file.label] = 1.0
    # A float32 number is compared with a float32 bound, which 0.62 as a Python float is not.
    needed = float(np.float32(text.min_coverage))
    return [
        Coverage(
            concept.id,
            tuple((label, numbers[label]) for label in policy.labels_of(concept)),
            tuple((label, numbers[label]) for label in contrast[concept.id]),
            needed,
        )
        for concept in policy.concepts
    ]


def embed_prompts(prompts: Sequence[str], policy: Policy, text: TextSide) -> Floats:
    """Rows [P, dim] of the norm of the model's texts: the direction of the mean over the policy's
    templates.

    A model whose text side names things rather than reads captions (`uses_templates` False) gets
    the bare prompts.
    """
    if not text.uses_templates:
        return text.encode_text(prompts)
    texts = [one for prompt in prompts for one in policy.texts(prompt)]
    rows = text.encode_text(texts).reshape(len(prompts), len(policy.templates), -1)
    mean = rows.mean(1)
    norm = np.linalg.norm(mean, axis=-1, keepdims=True)
    unit: Floats = mean / np.maximum(norm, np.float32(1e-12)) * np.float32(text.text_norm)
    return unit


def _rows(policy: Policy, text: TextSide, contrast: Sequence[Floats]) -> Floats:
    """A row for each prompt and each concept's examples.

    contrast: of each concept, the rows that it is compared with.
    """
    texts = [prompt for concept in policy.concepts for prompt in concept.prompts]
    embedded = iter(embed_prompts(texts, policy, text) if texts else ())
    rows: list[Any] = []
    for concept, against in zip(policy.concepts, contrast, strict=True):
        rows += [next(embedded) for _ in concept.prompts]
        file = policy.examples_of(concept)
        if file is not None:
            rows.append(text.learned_row(file, against))
    return np.stack(rows)


def _contrast(
    policy: Policy, text: TextSide, hidden: Container[str]
) -> tuple[Floats, list[tuple[int, int]]]:
    """All distinct contrast sets one after the other, and which of them each concept uses.

    hidden: the prompts that the model cannot see. Their rows mean nothing, and may not take
    anything away from a match.
    A concept of examples alone is compared with its own contrast prompts: its negatives are what
    a policy's and a model's are for prompts. Without any it is compared with nothing, a row of 0.
    """
    # A policy without any contrast is judged against the model's own neutral prompts; a model
    # whose baseline is part of its score (`always_neutral`) adds them to every set.
    sets = []
    for concept in policy.concepts:
        given = policy.contrast_of(concept) if concept.prompts else concept.contrast
        texts = tuple(label for label in given if label not in hidden)
        if not concept.prompts:
            texts = texts or (_NOTHING,)
        elif not texts or text.always_neutral:
            texts = tuple(dict.fromkeys(texts + text.neutral_prompts))
        sets.append(texts)
    distinct = list(dict.fromkeys(sets))
    unique = list(dict.fromkeys(label for one in distinct for label in one))
    named = [label for label in unique if label != _NOTHING]
    embedded = np.zeros((len(unique), text.dim), np.float32)
    if named:
        there = [label != _NOTHING for label in unique]
        embedded[there] = embed_prompts(named, policy, text)
    row = {label: index for index, label in enumerate(unique)}
    order = [row[label] for one in distinct for label in one]
    ranges = dict(zip(distinct, _ranges([len(one) for one in distinct]), strict=True))
    return embedded[order], [ranges[one] for one in sets]


_NOTHING = ""
"""Stands for a row of zeros: no prompt is empty."""


def _ranges(lengths: Sequence[int]) -> list[tuple[int, int]]:
    ranges, begin = [], 0
    for length in lengths:
        ranges.append((begin, begin + length))
        begin += length
    return ranges
