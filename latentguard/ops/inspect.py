"""What runs where: the operators' back ends, the build, and a self-test against the reference."""

from __future__ import annotations

from typing import Any

import torch

from latentguard.ops import build_info, library, reference
from latentguard.ops.concept_heatmap import concept_heatmap
from latentguard.ops.concept_similarity import concept_similarity
from latentguard.ops.patch_embed import patch_embed

OPERATORS = ("patch_embed", "concept_similarity", "concept_heatmap")
# As tests/ops: relative to the norm, margins absolute.
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
    """Each operator's error against the reference in float64; see TOLERANCE."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    patch: list[Any] = [normal(2, 4, 8, 8), normal(64, 4, 4, 4) / 8, normal(64), normal(5, 64)]
    patch += [normal(64), normal(64), 1e-5]
    head = [normal(64), normal(64), 1e-5, normal(64, 64) / 8]
    unit = torch.nn.functional.normalize(normal(9, 64).float(), dim=-1).to(dtype)
    ranges = torch.tensor([[0, 3], [3, 9]], dtype=torch.int32)
    bank = [unit, ranges, unit[:4].contiguous(), torch.tensor([[0, 4], [1, 2]], dtype=torch.int32)]
    features, tokens = normal(3, 64), normal(2, 5, 64)

    def to(values: list[Any], target: Any) -> list[Any]:
        floating = not isinstance(target, torch.dtype)
        return [
            v.to(target)
            if isinstance(v, torch.Tensor) and (floating or v.is_floating_point())
            else v
            for v in values
        ]

    def error(got: torch.Tensor, want: torch.Tensor, margin: bool) -> float:
        difference = got.double().cpu() - want
        return float(difference.abs().max() if margin else difference.norm() / want.norm())

    exact = torch.float64
    with torch.no_grad():
        similar = [features, *head, *bank, 10.0]
        heat = [tokens, *head, *bank]
        found = {
            "patch_embed": patch_embed(*to(patch, device)),
            "concept_similarity": concept_similarity(*to(similar, device))[1],
            "concept_heatmap": concept_heatmap(*to(heat, device)),
        }
        right = {
            "patch_embed": reference.patch_embed(*to(patch, exact)),
            "concept_similarity": reference.concept_similarity(*to(similar, exact))[1],
            "concept_heatmap": reference.concept_heatmap(*to(heat, exact))[0],
        }
    return {name: error(found[name], right[name], name != "patch_embed") for name in OPERATORS}
