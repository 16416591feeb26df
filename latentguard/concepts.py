"""ConceptBank: a policy's prompts as an encoder embeds them, and what it has learned from examples,
ready for ops.concept_similarity.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.coverage import Coverage, check_coverage
from latentguard.encoders import Encoder, traits
from latentguard.encoders.examples import Widened, whole, widened
from latentguard.errors import ModelError, PolicyError
from latentguard.policy import Policy
from latentguard.policy.examples import ConceptFile, Learned


@dataclass(frozen=True)
class ConceptBank:
    """The prompts of K concepts and their contrast, embedded in an encoder's joint space.

    A concept's examples are one more row behind its prompts: a learned head, with a norm and a bias
    of its own.

    prompts: P texts, concept after concept, as the policy has them; a label for examples.
    embeddings: [P, dim], of the norm of the encoder's texts; zero for a prompt that the encoder
        cannot see, so that it matches nothing.
    segments: [K, 2] int32, the rows of `embeddings` that belong to each concept.
    contrast: [Q, dim], unit norm, and contrast_segments [K, 2] int32 into it; concepts with the
        same contrast share a range.
    coverage: [P], how much of each prompt the encoder can see, 0 to 1.
    seen: P flags, whether the encoder sees each prompt.
    covered: K flags, whether the encoder sees at least one prompt of the concept.
    unseen_contrast: the contrast prompts that the encoder cannot see, each once; no concept is
        compared with them.
    """

    prompts: tuple[str, ...]
    embeddings: Tensor
    segments: Tensor
    contrast: Tensor
    contrast_segments: Tensor
    coverage: Tensor
    seen: tuple[bool, ...]
    covered: tuple[bool, ...]
    unseen_contrast: tuple[str, ...] = ()

    @classmethod
    def build(cls, policy: Policy, encoder: Encoder) -> ConceptBank:
        """Bind a policy to an encoder.

        Raises:
            CoverageError: the encoder cannot see a prompt and the policy says `uncovered: error`,
                or it can see none at all. It is a PolicyError and a ModelError.
            PolicyError: a file of examples cannot be read, or its head is of other features.
            ModelError: a file of examples was not learned for this encoder.
        """
        labels = [policy.labels_of(concept) for concept in policy.concepts]
        prompts = tuple(text for texts in labels for text in texts)
        segments = _ranges([len(texts) for texts in labels])
        found = coverage_of(policy, encoder)
        check_coverage(policy, encoder.name, found)
        seen = tuple(flag for concept in found for flag in concept.seen)
        hidden = dict.fromkeys(text for concept in found for text, _ in concept.unseen_contrast)
        contrast, ranges = _contrast(policy, encoder, hidden)
        embeddings = _rows(policy, encoder, [contrast[begin:end] for begin, end in ranges])
        # The operators take a bank of the features' dtype; encoders give float32.
        visible = torch.tensor(seen).to(embeddings)
        embeddings = (embeddings * visible[:, None]).to(encoder.dtype)
        contrast = contrast.to(encoder.dtype)
        return cls(
            prompts,
            embeddings,
            torch.tensor(segments, dtype=torch.int32, device=encoder.device),
            contrast,
            torch.tensor(ranges, dtype=torch.int32, device=encoder.device),
            torch.tensor([value for concept in found for _, value in concept.prompts]),
            seen,
            tuple(any(concept.seen) for concept in found),
            tuple(hidden),
        )


def _rows(policy: Policy, encoder: Encoder, contrast: Sequence[Tensor]) -> Tensor:
    """A row for each prompt and each concept's examples.

    contrast: of each concept, the rows that it is compared with.
    """
    texts = [text for concept in policy.concepts for text in concept.prompts]
    embedded = iter(embed_prompts(texts, policy, encoder)) if texts else iter(())
    rows: list[Tensor] = []
    for concept, against in zip(policy.concepts, contrast, strict=True):
        rows += [next(embedded) for _ in concept.prompts]
        file = policy.examples_of(concept)
        if file is not None:
            rows.append(_learned_row(file, encoder, against))
    return torch.stack(rows)


def _learned_row(file: ConceptFile, encoder: Encoder, contrast: Tensor) -> Tensor:
    """The head of an encoder, level with what its concept is compared with."""
    entry, wide = _entry(file, encoder), whole(encoder)
    if not isinstance(wide, Widened):
        raise ModelError(f"{wide.name} has no place for what was learned from examples")
    mean = wide.joint_row(torch.from_numpy(entry.joint).to(encoder.device))
    # Of an image like the negatives, the head alone decides.
    level = float((contrast.float() @ mean).max())
    return wide.head_row(torch.from_numpy(entry.weight), entry.bias + level)


def _entry(file: ConceptFile, encoder: Encoder) -> Learned:
    """What was learned for an encoder.

    Raises ModelError where nothing was, PolicyError where it is of other features.
    """
    model = whole(encoder)
    entry, wide = file.entry(model.name, model.sha256, model.space), widened(model)
    assert isinstance(wide, Widened)
    try:
        wide.joint_row(torch.from_numpy(entry.joint))
        wide.head_row(torch.from_numpy(entry.weight), entry.bias)
    except ValueError as error:
        raise PolicyError(f"{file.path}: {error}") from error
    return entry


def coverage_of(policy: Policy, encoder: Encoder) -> list[Coverage]:
    """What the encoder sees of each concept, prompt by prompt; examples it sees.

    Raises ModelError where a file of examples was not learned for this encoder, PolicyError where
    it is of other features.
    """
    contrast = {concept.id: policy.contrast_of(concept) for concept in policy.concepts}
    texts = [text for concept in policy.concepts for text in concept.prompts]
    texts += [text for prompts in contrast.values() for text in prompts]
    texts = list(dict.fromkeys(texts))
    found = encoder.coverage(texts).float().tolist() if texts else []
    numbers = dict(zip(texts, found, strict=True))
    for concept in policy.concepts:
        file = policy.examples_of(concept)
        if file is not None:
            _entry(file, encoder)
            numbers[file.label] = 1.0
    # A float32 number is compared with a float32 bound, which 0.62 as a Python float is not.
    needed = float(torch.tensor(encoder.min_coverage, dtype=torch.float32))
    return [
        Coverage(
            concept.id,
            tuple((text, numbers[text]) for text in policy.labels_of(concept)),
            tuple((text, numbers[text]) for text in contrast[concept.id]),
            needed,
        )
        for concept in policy.concepts
    ]


def embed_prompts(prompts: Sequence[str], policy: Policy, encoder: Encoder) -> Tensor:
    """Embeddings [P, dim] of the norm of the encoder's texts: the direction of the mean over the
    policy's templates.

    An encoder whose text side names things rather than reads captions (`uses_templates` False)
    gets the bare prompts.
    """
    if not encoder.uses_templates:
        return encoder.encode_text(prompts)
    texts = [text for prompt in prompts for text in policy.texts(prompt)]
    embedded = encoder.encode_text(texts).view(len(prompts), len(policy.templates), -1)
    mean = F.normalize(embedded.float().mean(1), dim=-1)
    norm = traits(encoder).text_norm
    return (mean if norm == 1 else mean * norm).to(embedded.dtype)


def _contrast(
    policy: Policy, encoder: Encoder, hidden: Container[str]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """All distinct contrast sets one after the other, and which of them each concept uses.

    hidden: the prompts that the encoder cannot see. Their embeddings mean nothing, and may not
    take anything away from a match.
    A concept of examples alone is compared with its own contrast prompts: its negatives are what
    a policy's and a model's are for prompts. Without any it is compared with nothing, a row of 0.
    """
    # A policy without any contrast is judged against the model's own neutral prompts; a model
    # whose baseline is part of its score (`always_neutral`) adds them to every set.
    sets = []
    for concept in policy.concepts:
        given = policy.contrast_of(concept) if concept.prompts else concept.contrast
        texts = tuple(text for text in given if text not in hidden)
        if not concept.prompts:
            texts = texts or (_NOTHING,)
        elif not texts or encoder.always_neutral:
            texts = tuple(dict.fromkeys(texts + encoder.neutral_prompts))
        sets.append(texts)
    distinct = list(dict.fromkeys(sets))
    unique = list(dict.fromkeys(text for one in distinct for text in one))
    named = [text for text in unique if text != _NOTHING]
    embedded = torch.zeros(len(unique), encoder.dim, device=encoder.device)
    if named:
        there = torch.tensor([text != _NOTHING for text in unique])
        embedded[there] = embed_prompts(named, policy, encoder).float()
    row = {text: index for index, text in enumerate(unique)}
    order = [row[text] for one in distinct for text in one]
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
