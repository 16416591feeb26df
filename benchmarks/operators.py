"""Times every operator against eager PyTorch, torch.compile and its matrix products alone.

    python benchmarks/operators.py [--device cpu|cuda] [--dtype float32] [--batch 1 8 64]
                                   [--seconds 1.0] [--no-compile] [--output FILE.json]

Ways of one operator are timed in turns within one run, so that the machine's mood falls on all of
them; figures are medians. On a GPU, CUDA events, with the second-level cache flushed before each
call, and the fraction of the memory roofline. Eager is the reference (ops/reference.py) for
patch_embed and a slice per concept for the similarities; "products" are the matrix products that
the operator cannot avoid, by themselves.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard import ops
from latentguard.ops import inspect, reference

EPS = 1e-5
CONCEPTS, PROMPTS, CONTRASTS = 12, 10, 40
# Bytes a second of the memory, for the roofline (data sheets).
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 1.94e12}


class Size(NamedTuple):
    """A Latent-CLIP at 512 px."""

    name: str
    patch: int
    dim: int
    embed: int


SIZES = (Size("B/8", 8, 768, 512), Size("B/4-plus", 4, 640, 640))
Way = Callable[[], Any]


class Timer:
    """Times ways in turns; results in milliseconds."""

    def __init__(self, device: str, seconds: float) -> None:
        self.cuda = device == "cuda"
        self.seconds = seconds
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if self.cuda else None

    def once(self, way: Way) -> float:
        if not self.cuda:
            start = time.perf_counter()
            way()
            return (time.perf_counter() - start) * 1e3
        assert self.flush is not None
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        way()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def medians(self, ways: dict[str, Way]) -> dict[str, float]:
        for way in ways.values():
            for _ in range(3):
                way()
        times: dict[str, list[float]] = {name: [] for name in ways}
        stop = time.perf_counter() + self.seconds
        while time.perf_counter() < stop or len(times[next(iter(ways))]) < 5:
            for name, way in ways.items():
                times[name].append(self.once(way))
        return {name: statistics.median(values) for name, values in times.items()}


def eager_similarity(
    features: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    projection: Tensor,
    concepts: Tensor,
    contrast: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a user would write: cosines to all prompts, equal groups, one shared contrast."""
    x = F.layer_norm(features, features.shape[-1:], ln_weight, ln_bias, EPS) @ projection
    x = F.normalize(x, dim=-1)
    cosine = (x @ concepts.t()).unflatten(-1, (CONCEPTS, PROMPTS))
    value, index = cosine.max(-1)
    index = index + torch.arange(CONCEPTS, device=x.device) * PROMPTS
    margin = value - (x @ contrast.t()).amax(-1, keepdim=True)
    return torch.sigmoid(margin * scale), margin, index


def _with_backward(function: Callable[..., Tensor], x: Tensor, grad: Tensor) -> Way:
    """Backward alone: the forward is done once and its graph kept."""
    out = function(x)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)


def _tensors(size: Size, batch: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, size.embed, generator=g), dim=-1).to(device, dtype)

    cuts = torch.arange(CONCEPTS, dtype=torch.int32, device=device) * PROMPTS
    shared = torch.tensor([[0, CONTRASTS]] * CONCEPTS, dtype=torch.int32, device=device)
    tokens = (64 // size.patch) ** 2
    return {
        "latents": normal(batch, 4, 64, 64),
        "noise": normal(batch, 4, 64, 64),
        "weight": normal(size.dim, 4, size.patch, size.patch) * 0.05,
        "class": normal(size.dim),
        "position": normal(1 + tokens, size.dim),
        "ln_weight": normal(size.dim),
        "ln_bias": normal(size.dim),
        "alpha": torch.ones(batch, device=device),
        "sigma": torch.full((batch,), 0.5, device=device),
        "scale": torch.full((4,), 1 / 0.13025, device=device),
        "shift": torch.zeros(4, device=device),
        "features": normal(batch, size.dim),
        "tokens": normal(batch, tokens, size.dim),
        "projection": normal(size.dim, size.embed) * size.dim**-0.5,
        "concepts": unit(CONCEPTS * PROMPTS),
        "segments": torch.stack((cuts, cuts + PROMPTS), 1).contiguous(),
        "contrast": unit(CONTRASTS),
        "shared": shared,
    }


def _ways(
    operator: str, t: dict[str, Tensor], compile_too: bool
) -> tuple[dict[str, Way], dict[str, Way]]:
    """Ways to compute the forward, and the backward, of one operator."""
    if operator.startswith("patch_embed"):
        clean = [t[k] for k in ("scale", "shift")]
        if operator == "patch_embed":
            clean += [t[k] for k in ("noise", "alpha", "sigma")]
        fixed = [t[k] for k in ("weight", "class", "position", "ln_weight", "ln_bias")]
        x = t["latents"]

        def fused(x: Tensor) -> Tensor:
            return ops.patch_embed(x, *fixed, EPS, *clean)

        def eager(x: Tensor) -> Tensor:
            return reference.patch_embed(x, *fixed, EPS, *clean)

        p = t["weight"].shape[-1]
        patches = F.unfold(x.float(), p, stride=p).transpose(1, 2).contiguous().to(x.dtype)
        flat = t["weight"].flatten(1).t()

        def products() -> Any:
            return patches @ flat

    else:
        head = [t["ln_weight"], t["ln_bias"], EPS, t["projection"]]
        bank = [t["concepts"], t["segments"], t["contrast"], t["shared"]]
        plain = [t["ln_weight"], t["ln_bias"], t["projection"], t["concepts"], t["contrast"]]
        one = operator == "concept_similarity"
        x = t["features" if one else "tokens"]

        def fused(x: Tensor) -> Tensor:
            if one:
                return ops.concept_similarity(x, *head, *bank, 10.0)[1]
            return ops.concept_heatmap(x, *head, *bank)

        def eager(x: Tensor) -> Tensor:
            margin = eager_similarity(x, *plain, 10.0)[1]
            return margin if one else margin.transpose(1, 2).contiguous()

        prompts, contrast = t["concepts"].t(), t["contrast"].t()

        def products() -> Any:
            z = x @ t["projection"]
            return z @ prompts, z @ contrast

    with torch.no_grad():
        grad = torch.randn_like(fused(x))
    forward: dict[str, Way] = {"fused": lambda: fused(x), "eager": lambda: eager(x)}
    if compile_too:
        compiled = torch.compile(eager)
        forward["compiled"] = lambda: compiled(x)
    forward["products"] = products
    leaf = x.clone().requires_grad_()
    backward = {
        "fused": _with_backward(fused, leaf, grad),
        "eager": _with_backward(eager, leaf, grad),
    }
    return forward, backward


def _bytes(operator: str, t: dict[str, Tensor]) -> int:
    """The least memory traffic: each input read once, each output written once."""

    def size(*names: str) -> int:
        return sum(t[name].numel() * t[name].element_size() for name in names)

    if operator.startswith("patch_embed"):
        batch, rows = t["latents"].shape[0], t["position"].shape[0]
        out = batch * rows * t["weight"].shape[0] * t["weight"].element_size()
        noise = size("noise") if operator == "patch_embed" else 0
        return size("latents", "weight", "class", "position", "ln_weight", "ln_bias") + noise + out
    x = "features" if operator == "concept_similarity" else "tokens"
    rows = t[x].numel() // t[x].shape[-1]
    results = rows * CONCEPTS * (4 if x == "tokens" else 24)
    return size(x, "projection", "concepts", "contrast", "ln_weight", "ln_bias") + results


OPERATORS = ("patch_embed", "patch_embed without noise", "concept_similarity", "concept_heatmap")


def main() -> int:
    """Run and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: --device cuda needs a GPU, torch.cuda.is_available() is False")
        return 0
    dtype = getattr(torch, options.dtype)
    timer = Timer(options.device, options.seconds)
    rows = []
    print(
        "| operator | model | batch | pass | fused ms | eager / | compiled / | fused / products |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in SIZES:
        for batch in options.batch:
            tensors = _tensors(size, batch, options.device, dtype)
            for operator in OPERATORS:
                ways = _ways(operator, tensors, not options.no_compile)
                for name, group in zip(("forward", "backward"), ways, strict=True):
                    with torch.set_grad_enabled(name == "backward"):
                        ms = timer.medians(group)
                    ratio = {k: v / ms["fused"] for k, v in ms.items()}
                    row = {"operator": operator, "model": size.name, "batch": batch, "pass": name}
                    row |= {"ms": ms}
                    if options.device == "cuda" and name == "forward":
                        device = torch.cuda.get_device_name()
                        peak = next((v for k, v in BANDWIDTH.items() if k in device), None)
                        if peak:
                            least = _bytes(operator, tensors) / peak * 1e3
                            row["roofline"] = least / ms["fused"]
                    rows.append(row)
                    cells = [f"{ratio[k]:.2f}" if k in ratio else "" for k in ("eager", "compiled")]
                    against = f"{1 / ratio['products']:.2f}" if "products" in ratio else ""
                    print(
                        f"| {operator} | {size.name} | {batch} | {name} | {ms['fused']:.3f} "
                        f"| {cells[0]} | {cells[1]} | {against} |",
                        flush=True,
                    )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "device": options.device,
            "dtype": options.dtype,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "build": inspect.build(),
            "prompts": CONCEPTS * PROMPTS,
            "contrasts": CONTRASTS,
        }
        options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
