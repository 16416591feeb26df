"""The text side of a packaged model, as `latentguard.bank.TextSide`."""

from __future__ import annotations

from collections.abc import Sequence

from latentguard.bank import Floats
from latentguard.bundled.weights import Weights
from latentguard.encoders.class_text import DIM, MIN_COVERAGE, NEUTRAL_PROMPTS, ClassText
from latentguard.errors import ModelError
from latentguard.policy.examples import ConceptFile


class NanoText:
    """Prompts as rows of the joint space.

    Prompts of the shipped policies and names of classes are known; others are placed by the
    sentence encoder of the extra `nano`, where it is installed, and else are a ModelError.
    """

    dim = DIM
    text_norm = 1.0
    min_coverage = MIN_COVERAGE
    neutral_prompts = NEUTRAL_PROMPTS
    always_neutral = True
    uses_templates = False

    def __init__(self, weights: Weights, name: str) -> None:
        self.name = name
        stored = dict(zip(weights.text("prompts"), weights.tensors["text.prompts"], strict=True))
        names = weights.text("class_names")
        self._text = ClassText(weights.tensors["text.table"], stored, names)

    def encode_text(self, texts: Sequence[str]) -> Floats:
        return self._text.encode(texts)

    def coverage(self, texts: Sequence[str]) -> Floats:
        return self._text.coverage(texts)

    def check_learned(self, file: ConceptFile) -> None:
        raise ModelError(
            f"{file.path}: concepts that were learned from examples are judged with torch: "
            "pip install 'latentguard[torch]' (--runtime torch), or export the policy where "
            "torch is"
        )

    def learned_row(self, file: ConceptFile, contrast: Floats) -> Floats:
        self.check_learned(file)
        raise AssertionError
