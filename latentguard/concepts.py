"""ConceptBank: a policy's prompts as an encoder embeds them, ready for ops.concept_similarity."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.coverage import Coverage, check_coverage
from latentguard.encoders import Encoder
from latentguard.policy import Policy


@dataclass(frozen=True)
class ConceptBank:
    """The prompts of K concepts and their contrast, embedded in an encoder's joint space.

    prompts: P texts, concept after concept, as the policy has them.
    embeddings: [P, dim], unit norm; zero for a prompt that the encoder cannot see, so that it
        matches nothing.
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
        """
        prompts = tuple(prompt for concept in policy.concepts for prompt in concept.prompts)
        segments = _ranges([len(concept.prompts) for concept in policy.concepts])
        found = coverage_of(policy, encoder)
        check_coverage(policy, encoder.name, found)
        seen = tuple(flag for concept in found for flag in concept.seen)
        hidden = dict.fromkeys(text for concept in found for text, _ in concept.unseen_contrast)
        embeddings = embed_prompts(prompts, policy, encoder)
        # The operators take a bank of the features' dtype; encoders give float32.
        visible = torch.tensor(seen).to(embeddings)
        embeddings = (embeddings * visible[:, None]).to(encoder.dtype)
        contrast, ranges = _contrast(policy, encoder, hidden)
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


def coverage_of(policy: Policy, encoder: Encoder) -> list[Coverage]:
    """What the encoder sees of each concept, prompt by prompt."""
    contrast = {concept.id: policy.contrast_of(concept) for concept in policy.concepts}
    texts = [text for concept in policy.concepts for text in concept.prompts]
    texts += [text for prompts in contrast.values() for text in prompts]
    texts = list(dict.fromkeys(texts))
    numbers = dict(zip(texts, encoder.coverage(texts).float().tolist(), strict=True))
    # A float32 number is compared with a float32 bound, which 0.62 as a Python float is not.
    needed = float(torch.tensor(encoder.min_coverage, dtype=torch.float32))
    return [
        Coverage(
            concept.id,
            tuple((text, numbers[text]) for text in concept.prompts),
            tuple((text, numbers[text]) for text in contrast[concept.id]),
            needed,
        )
        for concept in policy.concepts
    ]


def embed_prompts(prompts: Sequence[str], policy: Policy, encoder: Encoder) -> Tensor:
    """Unit-norm embeddings [P, dim]: the normalized mean over the policy's templates.

    An encoder whose text side names things rather than reads captions (`uses_templates` False)
    gets the bare prompts.
    """
    if not encoder.uses_templates:
        return encoder.encode_text(prompts)
    texts = [text for prompt in prompts for text in policy.texts(prompt)]
    embedded = encoder.encode_text(texts).view(len(prompts), len(policy.templates), -1)
    return F.normalize(embedded.float().mean(1), dim=-1).to(embedded.dtype)


def _contrast(
    policy: Policy, encoder: Encoder, hidden: Container[str]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """All distinct contrast sets one after the other, and which of them each concept uses.

    hidden: the prompts that the encoder cannot see. Their embeddings mean nothing, and may not
    take anything away from a match.
    """
    # A policy without any contrast is judged against the model's own neutral prompts; a model
    # whose baseline is part of its score (`always_neutral`) adds them to every set.
    sets = []
    for concept in policy.concepts:
        texts = tuple(text for text in policy.contrast_of(concept) if text not in hidden)
        if not texts or encoder.always_neutral:
            texts = tuple(dict.fromkeys(texts + encoder.neutral_prompts))
        sets.append(texts)
    distinct = list(dict.fromkeys(sets))
    unique = list(dict.fromkeys(text for one in distinct for text in one))
    embedded = embed_prompts(unique, policy, encoder)
    row = {text: index for index, text in enumerate(unique)}
    order = [row[text] for one in distinct for text in one]
    ranges = dict(zip(distinct, _ranges([len(one) for one in distinct]), strict=True))
    return embedded[order].to(encoder.dtype), [ranges[one] for one in sets]


def _ranges(lengths: Sequence[int]) -> list[tuple[int, int]]:
    ranges, begin = [], 0
    for length in lengths:
        ranges.append((begin, begin + length))
        begin += length
    return ranges
