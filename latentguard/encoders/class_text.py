"""Prompts as weightings of ImageNet classes: the text side of the nano encoders.

A classifier knows 1,000 names, not language. A sentence encoder places a prompt among those names
and their dictionary definitions; the prompt becomes a distribution over the classes near it, and
its cosine with an image's class posterior (square roots of both, so that both have unit norm) is
the Bhattacharyya coefficient of the two distributions. Measured against the convex combination of
class embeddings (ConSE, Norouzi et al. 2014, arXiv 1312.5650) in docs/nano.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TEMPERATURE = 0.05
"""Of the softmax from similarities to class weights: 0.1 less similar is 7 times less weight."""

WINDOW = 0.15
"""Classes this much less similar than the nearest one get no weight."""

MIN_COVERAGE = 0.62
"""A prompt whose nearest class is less similar than this is not visible to the classifier."""


class ClassText:
    """Embeds prompts as unit vectors [1000] over the classes, and says how well they are covered.

    table: [2, 1000, 384], MiniLM embeddings of each class's name, and of "name: definition".
    stored: prompts whose similarities were computed when the model was made, so that they need no
        sentence encoder: prompt -> [1000] similarities.
    names: the classes' names. A text that is one of them has similarity 1 with that class.
    """

    def __init__(
        self, table: Tensor, stored: Mapping[str, Tensor], names: Sequence[str] = ()
    ) -> None:
        self._table = table.float()
        self._stored = dict(stored)
        self._classes: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            self._classes.setdefault(normalize(name), []).append(index)

    @property
    def stored_prompts(self) -> tuple[str, ...]:
        """The prompts that need no sentence encoder."""
        return tuple(self._stored)

    def similarities(self, texts: Sequence[str]) -> Tensor:
        """Mean cosine [P, 1000] of each text with the classes' names and definitions.

        Raises ModelError when a text is not stored and the sentence encoder is not installed.
        """
        keys = [normalize(text) for text in texts]
        fresh = list(dict.fromkeys(key for key in keys if key not in self._stored))
        if fresh:
            from latentguard.encoders.minilm import minilm

            rows = similarities(minilm().encode(fresh), self._table)
            known = {**self._stored, **dict(zip(fresh, rows, strict=True))}
        else:
            known = self._stored
        if not keys:
            return torch.empty(0, self._table.shape[1])
        found = torch.stack([known[key].float() for key in keys])
        for row, key in enumerate(keys):
            found[row, self._classes.get(key, [])] = 1.0
        return found

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings [P, 1000]: square roots of the class weights."""
        return weights(self.similarities(texts)).sqrt()

    def coverage(self, texts: Sequence[str]) -> Tensor:
        """Similarity [P] of the nearest class, 0 to 1."""
        if not texts:
            return torch.empty(0)
        return self.similarities(texts).amax(1).clamp(0, 1)


def normalize(text: str) -> str:
    """One spelling per prompt: no outer or doubled spaces, no article, no capitals."""
    words = text.lower().split()
    while len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)


def similarities(embeddings: Tensor, table: Tensor) -> Tensor:
    """Cosines of prompts [P, 384] with a table [2, 1000, 384], averaged over its halves."""
    return torch.einsum("pe,nce->pc", embeddings.float(), table.float()) / table.shape[0]


def weights(similarity: Tensor) -> Tensor:
    """Class distributions [P, 1000] (rows sum to 1) from similarities [P, 1000]."""
    top = similarity.amax(1, keepdim=True)
    logits = (similarity - top) / TEMPERATURE
    return logits.masked_fill(similarity < top - WINDOW, float("-inf")).softmax(1)
