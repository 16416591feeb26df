"""What runs where: the operators' back ends, the build, and a self-test against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from latentguard.ops import build_info, library
from latentguard.ops.concept_heatmap import concept_heatmap
from latentguard.ops.concept_similarity import concept_similarity
from latentguard.ops.patch_embed import patch_embed

OPERATORS = ("patch_embed", "concept_similarity", "concept_heatmap")
# As tests/ops: relative to the norm, margins and probabilities absolute.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def build() -> dict[str, Any]:
    """Facts of the build: compiler, cpu, cuda, architectures, sanitizers; or the reason of none."""
    if library.extension is None:
        return {"reason": library.missing}
    facts: dict[str, Any] = dict(library.extension.build_info())
    written = build_info.read() or {}
    if not facts["cuda"] and "without_cuda" in written:
        facts["without_cuda"] = written["without_cuda"]
    return facts


def devices() -> list[str]:
    """Device types that operators can run on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def choice(device: str, dtype: torch.dtype) -> str:
    """What an operator of this device and dtype uses: "C++", "CUDA" or "PyTorch reference"."""
    if dtype not in library.DTYPES or not library.compiled_for(device):
        return "PyTorch reference"
    return "C++" if device == "cpu" else "CUDA"


def self_test(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Each operator's error against the reference in float64, see TOLERANCE: the larger one of
    results and gradients; NaN where another prompt was found to match best."""
    inputs = _inputs(dtype)
    found = {name: _run(name, values, device, dtype) for name, values in inputs.items()}
    right = {name: _run(name, values, "cpu", torch.float64) for name, values in inputs.items()}
    return {name: _error(name, found[name], right[name]) for name in OPERATORS}


def _inputs(dtype: torch.dtype) -> dict[str, list[Any]]:
    """Arguments of each operator, on the CPU; the first is the one that is differentiated."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    patch: list[Any] = [normal(2, 4, 8, 8), normal(64, 4, 4, 4) / 8, normal(64), normal(5, 64)]
    patch += [normal(64), normal(64), 1e-5]
    head = [normal(64), normal(64), 1e-5, normal(64, 64) / 8]
    unit = torch.nn.functional.normalize(normal(9, 64).float(), dim=-1).to(dtype)
    ranges = torch.tensor([[0, 3], [3, 9]], dtype=torch.int32)
    bank = [unit, ranges, unit[:4].contiguous(), torch.tensor([[0, 4], [1, 2]], dtype=torch.int32)]
    return {
        "patch_embed": patch,
        "concept_similarity": [normal(3, 64), *head, *bank, 10.0],
        "concept_heatmap": [normal(2, 5, 64), *head, *bank],
    }


def _run(
    name: str, values: list[Any], device: str, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The operator's results, and the gradient of its first argument, on the CPU."""
    given = [
        v.to(device, dtype if v.is_floating_point() else None) if torch.is_tensor(v) else v
        for v in values
    ]
    first = given[0].requires_grad_()
    out = _CALLS[name](first, *given[1:])
    results = list(out) if isinstance(out, tuple) else [out]
    scores = [result for result in results if result.is_floating_point()]
    weights = [torch.linspace(-1, 1, r.numel()).reshape(r.shape).to(r) for r in scores]
    (gradient,) = torch.autograd.grad(scores, first, weights)
    return [result.detach().cpu() for result in results], gradient.cpu()


_CALLS: dict[str, Callable[..., Any]] = {
    "patch_embed": patch_embed,
    "concept_similarity": concept_similarity,
    "concept_heatmap": concept_heatmap,
}


def _error(
    name: str,
    found: tuple[list[torch.Tensor], torch.Tensor],
    right: tuple[list[torch.Tensor], torch.Tensor],
) -> float:
    def relative(got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    errors = [relative(found[1], right[1])]
    for got, want in zip(found[0], right[0], strict=True):
        if not got.is_floating_point():
            errors.append(0.0 if torch.equal(got, want) else math.nan)
        elif name == "patch_embed":
            errors.append(relative(got, want))
        else:
            errors.append(float((got.double() - want).abs().max()))
    return math.nan if any(map(math.isnan, errors)) else max(errors)
