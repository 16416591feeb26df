"""ConceptBank: a policy's prompts as an encoder embeds them, ready for ops.concept_similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.encoders import Encoder
from latentguard.errors import ModelError
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
    covered: K flags, whether the encoder sees at least one prompt of the concept.
    """

    prompts: tuple[str, ...]
    embeddings: Tensor
    segments: Tensor
    contrast: Tensor
    contrast_segments: Tensor
    coverage: Tensor
    covered: tuple[bool, ...]

    @classmethod
    def build(cls, policy: Policy, encoder: Encoder) -> ConceptBank:
        """Bind a policy to an encoder.

        Raises:
            ModelError: the encoder cannot see a concept and the policy says `uncovered: error`,
                or it can see none at all.
        """
        prompts = tuple(prompt for concept in policy.concepts for prompt in concept.prompts)
        segments = _ranges([len(concept.prompts) for concept in policy.concepts])
        coverage = encoder.coverage(prompts).float().cpu()
        seen = coverage >= encoder.min_coverage
        covered = tuple(bool(seen[begin:end].any()) for begin, end in segments)
        _check_covered(policy, encoder, coverage, segments, covered)
        embeddings = embed_prompts(prompts, policy, encoder)
        # The operators take a bank of the features' dtype; encoders give float32.
        embeddings = (embeddings * seen.to(embeddings)[:, None]).to(encoder.dtype)
        contrast, ranges = _contrast(policy, encoder)
        return cls(
            prompts,
            embeddings,
            torch.tensor(segments, dtype=torch.int32, device=encoder.device),
            contrast,
            torch.tensor(ranges, dtype=torch.int32, device=encoder.device),
            coverage,
            covered,
        )


def embed_prompts(prompts: Sequence[str], policy: Policy, encoder: Encoder) -> Tensor:
    """Unit-norm embeddings [P, dim]: the normalised mean over the policy's templates.

    An encoder whose text side names things rather than reads captions (`uses_templates` False)
    gets the bare prompts.
    """
    if not encoder.uses_templates:
        return encoder.encode_text(prompts)
    texts = [text for prompt in prompts for text in policy.texts(prompt)]
    embedded = encoder.encode_text(texts).view(len(prompts), len(policy.templates), -1)
    return F.normalize(embedded.float().mean(1), dim=-1).to(embedded.dtype)


def _contrast(policy: Policy, encoder: Encoder) -> tuple[Tensor, list[tuple[int, int]]]:
    """All distinct contrast sets one after the other, and which of them each concept uses."""
    # A policy without any contrast is judged against the model's own neutral prompts; a model
    # whose baseline is part of its score (`always_neutral`) adds them to every set.
    sets = []
    for concept in policy.concepts:
        texts = policy.contrast_of(concept)
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


def _check_covered(
    policy: Policy,
    encoder: Encoder,
    coverage: Tensor,
    segments: Sequence[tuple[int, int]],
    covered: Sequence[bool],
) -> None:
    hidden = [
        f"{concept.id} ({coverage[begin:end].max():.2f})"
        for concept, (begin, end), seen in zip(policy.concepts, segments, covered, strict=True)
        if not seen
    ]
    if not hidden:
        return
    found = f"model {encoder.name} cannot see {len(hidden)} of {len(covered)} concepts of policy "
    found += f"'{policy.name}': {', '.join(hidden)}; coverage {encoder.min_coverage:g} is needed"
    if not any(covered):
        raise ModelError(f"{found}. Use another model")
    if policy.uncovered == "error":
        raise ModelError(
            f"{found}. Use another model, or write `uncovered: warn` in the policy to go on with "
            "those concepts marked as not visible"
        )
