"""ConceptBank: a policy's prompts as an encoder embeds them, and what it has learned from examples,
ready for ops.concept_similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentguard import bank
from latentguard.bank import BankRows, Floats
from latentguard.coverage import Coverage
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
        rows = BankRows.build(policy, EncoderText(encoder))

        def there(array: Any, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(array).to(encoder.device, dtype)

        return cls(
            rows.prompts,
            # The operators take a bank of the features' dtype.
            there(rows.embeddings, encoder.dtype),
            there(rows.segments, torch.int32),
            there(rows.contrast, encoder.dtype),
            there(rows.contrast_segments, torch.int32),
            torch.tensor(rows.coverage),
            rows.seen,
            rows.covered,
            rows.unseen_contrast,
        )


def coverage_of(policy: Policy, encoder: Encoder) -> list[Coverage]:
    """What the encoder sees of each concept, prompt by prompt; examples it sees.

    Raises ModelError where a file of examples was not learned for this encoder, PolicyError where
    it is of other features.
    """
    return bank.coverage_of(policy, EncoderText(encoder))


class EncoderText:
    """An encoder's text side for `latentguard.bank`, as a `TextSide`."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.name = encoder.name
        self.dim = encoder.dim
        self.text_norm = traits(encoder).text_norm
        self.min_coverage = encoder.min_coverage
        self.neutral_prompts = tuple(encoder.neutral_prompts)
        self.always_neutral = encoder.always_neutral
        self.uses_templates = encoder.uses_templates

    def encode_text(self, texts: Sequence[str]) -> Floats:
        return _array(self._encoder.encode_text(texts))

    def coverage(self, texts: Sequence[str]) -> Floats:
        return _array(self._encoder.coverage(texts))

    def check_learned(self, file: ConceptFile) -> None:
        _entry(file, self._encoder)

    def learned_row(self, file: ConceptFile, contrast: Floats) -> Floats:
        """The head of the encoder, level with what its concept is compared with."""
        entry, wide = _entry(file, self._encoder), whole(self._encoder)
        if not isinstance(wide, Widened):
            raise ModelError(f"{wide.name} has no place for what was learned from examples")
        mean = _array(wide.joint_row(torch.from_numpy(entry.joint)))
        # Of an image like the negatives, the head alone decides.
        level = float((contrast @ mean).max())
        return _array(wide.head_row(torch.from_numpy(entry.weight), entry.bias + level))


def _array(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().float().cpu().numpy()
    return found


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
