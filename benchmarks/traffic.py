"""Bytes and flops of the operators per image: eager PyTorch, the fused kernels, the minimum.

    python benchmarks/traffic.py        prints the table of docs/kernels.md

A model, not a measurement: bytes that cross to and from device memory in half precision, where
weights, banks and positions count once per call (they fit in the second-level cache, and blocks
that read them again read the cache). The minimum reads each input and writes each output once.
"""

from __future__ import annotations

from typing import NamedTuple

HALF, FLOAT, INDEX = 2, 4, 8
CELLS = 4 * 64 * 64
CONCEPTS, PROMPTS, CONTRASTS = 12, 120, 40


class Size(NamedTuple):
    """A Latent-CLIP at 512 px."""

    name: str
    patch: int
    dim: int
    embed: int

    @property
    def tokens(self) -> int:
        return (64 // self.patch) ** 2


SIZES = (Size("B/8", 8, 768, 512), Size("B/4-plus", 4, 640, 640))


class Traffic(NamedTuple):
    """Of one call with a batch of images."""

    eager: float
    fused: float
    minimum: float
    flops: float


def patch_embed(size: Size, batch: int, noise: bool = True) -> Traffic:
    """Latents (and noise) to tokens."""
    depth = 4 * size.patch**2
    latents = batch * CELLS * HALF
    tokens = batch * (1 + size.tokens) * size.dim * HALF
    weights = (size.dim * depth + (1 + size.tokens) * size.dim + 3 * size.dim) * HALF
    inputs = latents * (2 if noise else 1) + weights
    minimum = inputs + tokens
    # Each elementwise operator reads its operands and writes its result: sigma * noise, the
    # difference, / alpha (7 passes over the latents), * scale, + shift (4 more); the convolution
    # reads them once. Tokens: written by it, copied by cat, read and written by the sum and by
    # the layer norm.
    passes = (7 if noise else 0) + 4 + 1
    eager = passes * latents + weights + 7 * tokens
    return Traffic(eager, minimum, minimum, 2 * batch * size.tokens * size.dim * depth)


def concepts(size: Size, rows: int, heatmap: bool) -> Traffic:
    """Features or tokens to margins (and probabilities and indices)."""
    features = rows * size.dim * HALF
    weights = (size.dim * size.embed + (PROMPTS + CONTRASTS) * size.embed + 2 * size.dim) * HALF
    result = rows * CONCEPTS * (FLOAT if heatmap else 2 * FLOAT + 2 * INDEX)
    minimum = features + weights + result
    # Few rows: the projected rows and the keys pass through a workspace between two launches.
    # It is written; the second launch reads it from the second-level cache.
    workspace = 0
    if rows <= 64:
        workspace = rows * size.embed * HALF + rows * 2 * CONCEPTS * INDEX
    # Layer norm, product, norm and quotient, two products with [rows, P] results, two maxima over
    # them, difference, sigmoid.
    projected = rows * size.embed * HALF
    cosines = rows * (PROMPTS + CONTRASTS) * HALF
    eager = 3 * features + weights + (1 + 3 + 2) * projected + 2 * cosines
    eager += rows * CONCEPTS * (2 * (HALF + INDEX) + 5 * HALF)
    flops = 2 * rows * size.embed * (size.dim + PROMPTS + CONTRASTS)
    return Traffic(eager, minimum + workspace, minimum, flops)


def table() -> list[tuple[str, str, int, Traffic]]:
    """Operator, model, batch and the traffic of the call."""
    out = []
    for size in SIZES:
        for batch in (1, 8, 64):
            out.append(("patch_embed", size.name, batch, patch_embed(size, batch)))
            out.append(("concept_similarity", size.name, batch, concepts(size, batch, False)))
            rows = batch * size.tokens
            out.append(("concept_heatmap", size.name, batch, concepts(size, rows, True)))
    return out


def main() -> None:
    """Print the table, per image."""
    print(
        "| operator | model | batch | MFLOP | eager KB | fused KB | minimum KB | fused / minimum |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for operator, model, batch, t in table():
        print(
            f"| {operator} | {model} | {batch} | {t.flops / batch / 1e6:.1f} "
            f"| {t.eager / batch / 1e3:.1f} | {t.fused / batch / 1e3:.1f} "
            f"| {t.minimum / batch / 1e3:.1f} | {t.fused / t.minimum:.2f} |"
        )


if __name__ == "__main__":
    main()
