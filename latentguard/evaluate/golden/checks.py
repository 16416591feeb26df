"""What must hold of a model on clear pictures, and what is wrong where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from latentguard.encoders.base import traits
from latentguard.evaluate.golden.embedded import Embedded, Similar

ORDER = 0.5
"""The share of pictures whose right text has to win."""
CHANCE = 1e-3
"""How unlikely so many right ones have to be for who guesses."""
MARGIN = 1.0
"""Logits by which the right text has to win in the middle of the pictures."""
SHUFFLED = 0.01
"""How often shuffled labels may do as well."""
ERRORS = 2.0
"""Standard errors by which another reading has to be better for this one to be wrong."""
COSINE = 0.98
"""Of an embedding in half precision with the same in float32. Measured: 0.9916 or more, which is
nano-view in bfloat16 on the bundled latents; nano-flux2 0.9997."""
BITS = 7
"""Of a weight's fraction: bfloat16 has as many."""
NORM = 1e-3
"""By how much a norm may be off: what rounding to half precision does."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    passed: None where it says nothing. found: one sentence of what is the case. do: what to do
    where it did not pass.
    """

    name: str
    passed: bool | None
    found: str
    do: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(vars(self))


def every_check(embedded: Embedded) -> Iterator[Check]:
    """All of them, from the plainest to the finest; what is not finite ends them."""
    first = embeddings(embedded)
    yield first
    if not first.passed:
        return
    similar = embedded.similar
    yield order(similar)
    yield margins(similar)
    yield control(similar)
    yield convention(embedded.encoder.needs_scaled, similar, list(embedded.otherwise()))
    yield weights(embedded)
    for dtype in (torch.bfloat16, torch.float16):
        yield precision(embedded, dtype)


def embeddings(embedded: Embedded) -> Check:
    """Finite numbers, norms of one, and not the same for every picture."""
    encoder, name = embedded.encoder, "embeddings"
    pictures, texts = embedded.pictures, embedded.texts
    norms = ((pictures, 1.0, "pictures"), (texts, traits(encoder).text_norm, "texts"))
    for found, norm, what in norms:
        if not bool(torch.isfinite(found).all()):
            broken = "numbers that overflow, or weights that are not finite"
            do = "load the weights in float32, and fetch them again if that does not help"
            return Check(name, False, f"the embeddings of {what} are not finite: {broken}", do)
        worst = float((found.norm(dim=-1) - norm).abs().max())
        if worst > NORM:
            do = "this is a fault of the encoder's code and not of its weights: report it"
            sentence = f"the norms of the embeddings of {what} are off by {worst:.3g}"
            return Check(name, False, sentence, do)
    for found, what in ((pictures, "picture"), (texts, "text")):
        if float((found - found[0]).abs().max()) < NORM / 10:
            do = "the weights are wrong or damaged: fetch them again (models get NAME --force)"
            return Check(name, False, f"every {what} has the same embedding", do)
    return Check(name, True, "finite, of norm 1, and each picture has its own")


def order(similar: Similar) -> Check:
    """The right text wins far more often than by chance."""
    n, texts = similar.cosines.shape
    hits = similar.hits
    luck = _at_least(hits, n, 1 / texts)
    found = (
        f"the right text of {texts} wins for {hits} of {n} pictures; guessing gets {n / texts:.1f}"
    )
    passed = hits >= ORDER * n and luck < CHANCE
    do = (
        "the weights are wrong or damaged, or the latents are of another autoencoder or are read "
        "in another convention: see the check of the convention, compare the checkpoint's SHA-256 "
        "(latentguard models show), and name the autoencoder that the model was made for"
    )
    return Check("order", passed, found, "" if passed else do)


def margins(similar: Similar) -> Check:
    """By how much the right text wins."""
    middle = float(np.median(similar.margins))
    passed = middle >= MARGIN
    found = (
        f"the right text leads the best wrong one by {middle:.2f} logits in the middle of the "
        f"pictures; {MARGIN:g} is needed"
    )
    do = (
        "thresholds of probability would mean nothing: the weights are damaged or rounded, "
        f"logit_scale ({similar.logit_scale:.1f}) is wrong, or the latents are far from those that "
        "the model was trained on"
    )
    return Check("margins", passed, found, "" if passed else do)


def control(similar: Similar) -> Check:
    """Labels that are shuffled must do worse: a model that says one thing of everything fails."""
    own, other, p = similar.shuffled()
    passed = _tells(similar)
    found = (
        f"the right texts have a probability of {own:.2f} in the mean, shuffled ones {other:.2f}; "
        f"p = {p:.4f}"
    )
    do = "the scores do not depend on what a picture shows: the weights are wrong"
    return Check("shuffled labels", passed, found, "" if passed else do)


def convention(
    needs_scaled: bool, similar: Similar, others: Sequence[tuple[str, Similar]]
) -> Check:
    """The latents as the model is said to read them do better than in any other reading."""
    name = "convention"
    reads = "scaled" if needs_scaled else "unscaled"
    means = ", ".join(f"{what} {one.shuffled()[0]:.2f}" for what, one in others)
    found = f"probability of the right texts: {reads} latents {similar.shuffled()[0]:.2f}; {means}"
    worse = {what: similar.above(one) for what, one in others if _tells(one)}
    if worse and min(worse.values()) < -ERRORS:
        best = min(worse, key=lambda what: worse[what])
        do = (
            f"the model is given {reads} latents and does better with them {best}: the convention "
            "is wrong. Look at `needs_scaled` in the model's configuration, and at the space and "
            "scaling that the latents or the autoencoder are said to be of"
        )
        return Check(name, False, found, do)
    if not _tells(similar):
        unsaid = "none is better than chance, so this says nothing of scaling"
        return Check(name, None, f"{found}; {unsaid}")
    alike = [what for what, errors in worse.items() if errors <= 0]
    if alike:
        unsaid = f"this model does no worse with them {' or '.join(alike)}, so it cannot tell"
        return Check(name, None, f"{found}; {unsaid}")
    return Check(name, True, found)


def _tells(similar: Similar) -> bool:
    """Whether its texts fit the pictures better than they fit others."""
    return similar.shuffled()[2] < SHUFFLED


def weights(embedded: Embedded) -> Check:
    """How finely the weights are written: what was once rounded to 8 bits stays so in float32."""
    name = "weights"
    module = traits(embedded.encoder).module
    if module is None:
        return Check(name, None, f"{embedded.encoder.name} does not say where its weights are")
    bits = {
        key: _fraction_bits(value)
        for key, value in module.state_dict().items()
        if value.is_floating_point() and value.ndim >= 2 and bool((value != 0).any())
    }
    coarse = min(bits, key=lambda key: bits[key])
    found = f"written with {bits[coarse]} bits of fraction or more"
    if bits[coarse] >= BITS:
        return Check(name, True, found)
    return Check(
        name,
        False,
        f"{coarse} has {bits[coarse]} bits of fraction, and bfloat16 has {BITS}",
        "the weights were rounded to fewer than 16 bits before: take the official file",
    )


def precision(embedded: Embedded, dtype: torch.dtype) -> Check:
    """Embeddings by weights in half precision point where those in float32 do."""
    name = str(dtype).removeprefix("torch.")
    try:
        cosines = embedded.in_precision(dtype)
    except RuntimeError as error:  # no such arithmetic on this device
        return Check(name, None, f"was not tried: {str(error).splitlines()[0]}")
    worst = float(np.where(np.isfinite(cosines), cosines, -1).min())
    lost = int((~np.isfinite(cosines)).sum())
    found = f"the embeddings agree with those of float32, cosine {worst:.5f} or more"
    if worst >= COSINE:
        return Check(name, True, found)
    sentence = (
        f"{lost} of {len(cosines)} embeddings are not finite"
        if lost
        else f"an embedding has a cosine of {worst:.3f} with that of float32; {COSINE} is needed"
    )
    return Check(
        name, False, sentence, f"do not run this model in {name}; float32 is what it is loaded in"
    )


def _at_least(hits: int, n: int, chance: float) -> float:
    """The probability of so many hits or more among n guesses."""
    return sum(math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(hits, n + 1))


def _fraction_bits(weight: torch.Tensor) -> int:
    """Bits of the fraction that any of the numbers uses: 23 in float32, 10 in float16, 7 in
    bfloat16, 3 or 2 in float8."""
    whole = weight.detach().float().cpu().contiguous().view(torch.int32).numpy()
    used = int(np.bitwise_or.reduce(whole.ravel())) & 0x7FFFFF
    return 0 if used == 0 else 23 - ((used & -used).bit_length() - 1)
