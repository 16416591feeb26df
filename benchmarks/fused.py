"""What making x0 and unscaling inside the first operator changes, in time and in rounding.

    python benchmarks/fused.py

Latent-CLIP B/8 of random weights under the weapons policy, scaled SDXL latents of 512 px at a noise
level of 4 (noise, alpha and sigma as a scheduler gives them). Before: x0 and the raw latents are
tensors of their own. After: patch_embed reads the noisy latents and the noise. Both in one run, in
turns; the error is that of margins against float64. Results: benchmarks/results/fused.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine

from latentguard import Latents, Scorer
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.spaces import Prediction

RESULTS = Path(__file__).parent / "results"
LEVEL = 4.0
ROUNDS = 15


class Apart(LatentCLIP):
    """The same encoder, which is given x0 as raw latents."""

    unscales = False


def inputs(batch: int, dtype: torch.dtype) -> Prediction:
    generator = torch.Generator().manual_seed(batch)
    x0 = torch.randn(batch, 4, 64, 64, generator=generator) * 0.9
    noise = torch.randn(x0.shape, generator=generator)
    alpha = (1 + LEVEL**2) ** -0.5
    sigma = LEVEL * alpha
    noisy = Latents((alpha * x0 + sigma * noise).to(dtype), "sdxl", scaled=True)
    return Prediction(noisy, noise.to(dtype), alpha, sigma)


def alternating(*functions: Callable[[], Any]) -> list[float]:
    """Medians in milliseconds."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for kept, function in zip(seconds, functions, strict=True):
            began = time.perf_counter()
            function()
            kept.append(time.perf_counter() - began)
    return [1e3 * statistics.median(kept) for kept in seconds]


def measure(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    exact = Scorer("weapons", Apart.random("latent-clip-b8").to(dtype=torch.float64))
    before = Scorer("weapons", Apart.random("latent-clip-b8").to(dtype=dtype))
    after = Scorer("weapons", LatentCLIP.random("latent-clip-b8").to(dtype=dtype))
    prediction = inputs(batch, dtype)
    noisy, noise = prediction.latents.tensor.double(), prediction.noise.double()
    x0 = (noisy - prediction.sigma * noise) / prediction.alpha
    want = exact.score(Latents(x0, "sdxl", scaled=True)).margin
    row: dict[str, Any] = {"batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    with torch.inference_mode():
        for name, given in (("step", prediction), ("latents", prediction.x0())):
            ways = [lambda s=s, g=given: s.score(g).margin for s in (before, after)]
            errors = [float((way().double() - want).abs().max()) for way in ways]
            row[name] = {"ms": alternating(*ways), "error": errors}
    made = alternating(lambda: prediction.x0().standard(False))[0]
    return {**row, "x0_and_unscaling_ms": made}


def main() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    rows = [measure(batch, dtype) for dtype in dtypes for batch in (1, 4)]
    told = {"machine": machine(), "rounds": ROUNDS, "rows": rows}
    (RESULTS / "fused.json").write_text(json.dumps(told, indent=1) + "\n")
    name = "{cpu}, {cores} cores, torch {torch}".format(**machine())
    lines = [
        f"Latent-CLIP B/8, random weights, 512 px, noise level {LEVEL:g}; {name}; medians of "
        f"{ROUNDS}, the two ways in turns. Errors are the largest of the margins against float64.",
        "",
        "| batch | dtype | scored | ms before | ms after | error before | error after |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for name, title in (("step", "x0 of a step"), ("latents", "scaled latents")):
            (m1, m2), (e1, e2) = row[name]["ms"], row[name]["error"]
            lines.append(
                f"| {row['batch']} | {row['dtype']} | {title} | {m1:.1f} | {m2:.1f} | {e1:.1e} | "
                f"{e2:.1e} |"
            )
    (RESULTS / "fused.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
