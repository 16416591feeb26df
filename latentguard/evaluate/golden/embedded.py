"""Similarities of pictures with texts, as the model should read its latents and otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.encoders import Encoder
from latentguard.encoders.base import traits
from latentguard.errors import LatentsError, ModelError
from latentguard.evaluate.golden.cases import FEWEST, Case
from latentguard.evaluate.zeroshot import class_embeddings
from latentguard.spaces import Latents

TEMPLATES = ("a photo of {}",)
DRAWS = 10_000
"""Of shuffled labels."""
HALVED = 4
"""Pictures that are embedded in half precision, too, which a CPU is slow at."""


@dataclass(frozen=True)
class Asked:
    """Cases that a model can see, in the order of their latents.

    rows: of the latents. texts: all that are asked for, each once. right: [n] indices into them.
    left_out: ids of pictures for which the model has no text.
    """

    cases: tuple[Case, ...]
    rows: tuple[int, ...]
    texts: tuple[str, ...]
    right: NDArray[np.int64]
    left_out: tuple[str, ...]


def asked_of(encoder: Encoder, cases: Sequence[Case | None]) -> Asked:
    """What the model is asked. Raises ModelError where it can see too little of it."""
    kept, rows, shown, left_out = [], [], [], []
    for row, case in enumerate(cases):
        if case is None:
            continue
        seen = encoder.coverage(case.texts) >= encoder.min_coverage
        text = next((text for text, fine in zip(case.texts, seen, strict=True) if fine), None)
        if text is None:
            left_out.append(case.id)
            continue
        kept.append(case)
        rows.append(row)
        shown.append(text)
    texts = tuple(dict.fromkeys(shown))
    if len(texts) < FEWEST:
        raise ModelError(
            f"model {encoder.name} can be asked for {len(texts)} of the pictures that are here, "
            f"and {FEWEST} different ones are needed"
        )
    right = np.array([texts.index(text) for text in shown])
    return Asked(tuple(kept), tuple(rows), texts, right, tuple(left_out))


@dataclass(frozen=True)
class Similar:
    """Cosines [n, texts] of one reading; logit_scale: from differences of them to logits."""

    cosines: NDArray[np.float64]
    right: NDArray[np.int64]
    logit_scale: float

    @property
    def margins(self) -> NDArray[np.float64]:
        """[n] in logits: of the right text above the best wrong one."""
        every = np.arange(len(self.right))
        wrong = self.cosines.copy()
        wrong[every, self.right] = -np.inf
        found: NDArray[np.float64] = self.cosines[every, self.right] - wrong.max(1)
        return self.logit_scale * found

    @property
    def hits(self) -> int:
        """Pictures whose right text is above all others; a tie is none."""
        return int((self.margins > 0).sum())

    @property
    def belief(self) -> NDArray[np.float64]:
        """[n, texts]: each text's share of the softmax."""
        logits = self.logit_scale * self.cosines
        powers = np.exp(logits - logits.max(1, keepdims=True))
        shares: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
        return shares

    def above(self, other: Similar) -> float:
        """By how many standard errors these margins are above another reading's, picture by
        picture; 0 where no two differ."""
        by = self.margins - other.margins
        error = float(by.std(ddof=1)) / len(by) ** 0.5
        return 0.0 if error == 0 else float(by.mean()) / error

    def shuffled(self, seed: int = 0) -> tuple[float, float, float]:
        """The mean belief in the right texts, that in shuffled ones, and how often the shuffled
        ones do as well (a permutation test's p-value)."""
        belief = self.belief
        every = np.arange(len(self.right))
        own = float(belief[every, self.right].mean())
        rng = np.random.default_rng(seed)
        labels = rng.permuted(np.tile(self.right, (DRAWS, 1)), axis=1)
        drawn = belief[every, labels].mean(1)
        as_well = int((drawn >= own - 1e-9).sum())
        return own, float(drawn.mean()), (1 + as_well) / (1 + DRAWS)


class Embedded:
    """A model's embeddings of the pictures and texts that it is asked for.

    Raises LatentsError for latents of another space.
    """

    def __init__(self, encoder: Encoder, latents: Latents, asked: Asked) -> None:
        self.encoder, self.asked = encoder, asked
        self.latents = latents.pick(asked.rows).to(encoder.device).to(torch.float32)
        self.texts = class_embeddings(encoder, asked.texts, TEMPLATES)
        self.pictures = self._embed(self.latents)

    @property
    def similar(self) -> Similar:
        """In the reading that the model is said to need."""
        return self._similar(self.pictures)

    def otherwise(self) -> Iterator[tuple[str, Similar]]:
        """The same latents as they would be read by mistake: what was mistaken, and the cosines."""
        for name, latents in self._mistaken():
            yield name, self._similar(self._embed(latents))

    def in_precision(self, dtype: torch.dtype) -> NDArray[np.float64]:
        """Cosines of some embeddings by the weights in `dtype` with those in their own; NaN where
        one is not finite. Raises RuntimeError where this machine has no such arithmetic."""
        other = copy.deepcopy(self.encoder)
        module = traits(other).module
        if module is None:
            raise RuntimeError(f"{self.encoder.name} does not say where its weights are")
        module.to(dtype)
        rows = range(0, len(self.latents), max(1, len(self.latents) // HALVED))
        found = self._embed(self.latents.pick(rows), other)
        own = self.pictures[list(rows)]
        cosines = (found * own).sum(-1) / (found.norm(dim=-1) * own.norm(dim=-1))
        agreement: NDArray[np.float64] = cosines.double().cpu().numpy()
        return agreement

    @torch.inference_mode()
    def _embed(self, latents: Latents, encoder: Encoder | None = None) -> Tensor:
        """[n, dim] float32; one picture at a time, as nothing is won by more on a CPU."""
        encoder = encoder or self.encoder
        return torch.cat([encoder.encode_latents(one).float() for one in latents])

    def _similar(self, pictures: Tensor) -> Similar:
        cosines = (pictures @ self.texts.T).double().cpu().numpy()
        return Similar(cosines, self.asked.right, self.encoder.logit_scale)

    def _mistaken(self) -> Iterator[tuple[str, Latents]]:
        """Latents whose numbers are wrong in a way that nothing else would notice."""
        needs = self.encoder.needs_scaled
        right = self.latents.to_spatial().to_standard(needs)
        try:
            wrong = self.latents.to_spatial().to_standard(not needs).tensor
        except LatentsError:
            # A space whose scaling is in its autoencoder's weights, which are not here.
            yield "four times as large", _named(right, right.tensor * 4, needs)
            yield "a quarter as large", _named(right, right.tensor / 4, needs)
        else:
            yield "unscaled" if needs else "scaled", _named(right, wrong, needs)
        yield "with the channels in reverse", _named(right, right.tensor.flip(1), needs)


def _named(like: Latents, tensor: Tensor, scaled: bool) -> Latents:
    """Numbers that are said to be what they are not."""
    return Latents(tensor, like.space, scaled, ids=like.ids)
