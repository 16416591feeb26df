"""Where the operators' schemas meet their kernels.

The compiled extension `latentguard._C` defines the schemas and registers CPU (and CUDA) kernels.
Where it is absent, or was compiled without CUDA, the reference is registered in its place, so
that `torch.ops.latentguard` looks the same on every machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from latentguard.ops import build_info

HEAD = "Tensor? ln_weight, Tensor? ln_bias, float eps, Tensor? projection"
BANK = "Tensor concepts, Tensor segments, Tensor contrast, Tensor contrast_segments"
BACK = "Tensor? ln_weight, float eps, Tensor? projection, Tensor concepts, Tensor contrast"
SAVED = "Tensor best_prompt, Tensor best_contrast, Tensor projected"
CLEAN = (
    "Tensor? scale=None, Tensor? shift=None, Tensor? noise=None, Tensor? alpha=None, "
    "Tensor? sigma=None"
)

# The same strings stand in csrc/ops.cpp; a test compares the two.
SCHEMAS = {
    "patch_embed": (
        "(Tensor latents, Tensor weight, Tensor class_embedding, Tensor positional_embedding, "
        f"Tensor ln_weight, Tensor ln_bias, float eps, {CLEAN}) -> Tensor"
    ),
    "patch_embed_backward": (
        "(Tensor grad, Tensor latents, Tensor weight, Tensor positional_embedding, "
        f"Tensor ln_weight, float eps, {CLEAN}) -> Tensor"
    ),
    "concept_similarity": (
        f"(Tensor features, {HEAD}, {BANK}, float logit_scale, bool save=False) -> "
        f"(Tensor probability, Tensor margin, {SAVED})"
    ),
    "concept_similarity_backward": (
        f"(Tensor? grad_probability, Tensor? grad_margin, Tensor features, {BACK}, "
        f"Tensor probability, {SAVED}, float logit_scale) -> Tensor"
    ),
    "concept_heatmap": (
        f"(Tensor tokens, {HEAD}, {BANK}, bool save=False) -> (Tensor margin, {SAVED})"
    ),
    "concept_heatmap_backward": f"(Tensor grad, Tensor tokens, {BACK}, {SAVED}) -> Tensor",
}

# As kLargestWidth in csrc/cuda/launchers.h.
LARGEST_WIDTH = 1536
# Computed by the compiled kernels; every other dtype takes the reference.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _load() -> tuple[Any, str]:
    """The extension and why it is not used: (module, "") or (None, reason)."""
    try:
        module = importlib.import_module("latentguard._C")
    except ModuleNotFoundError:
        reason = (build_info.read() or {}).get("reason")
        return None, reason or "not compiled: latentguard was installed without torch"
    except ImportError as error:
        return None, f"compiled for another torch, or damaged: {error}"
    return module, ""


def _refused() -> str:
    """Why an extension that may be there is not loaded, or nothing."""
    if importlib.util.find_spec("latentguard._C") is None:
        return ""
    built = build_info.read() or {}
    here = torch.backends.cpu.get_cpu_capability()
    if built.get("cpu") == "AVX2" and here not in ("AVX2", "AVX512"):
        return f"compiled for AVX2, this processor offers {here}"
    if "reason" in built:  # the last build made nothing: what lies there is of one before
        return f"{built['reason']}; the extension of an earlier build is not loaded"
    if built.get("interface") != build_info.INTERFACE:
        return "compiled from an older version of latentguard: install it again"
    return ""


_reason = _refused()
extension, missing = (None, _reason) if _reason else _load()
_library: Any = torch.library.Library("latentguard", "DEF" if extension is None else "FRAGMENT")  # type: ignore[no-untyped-call]


def compiled_for(device: str) -> bool:
    """Whether kernels of our own exist for a device type."""
    return extension is not None and (device == "cpu" or bool(extension.build_info()["cuda"]))


def register(name: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give one operator what its kernels do not bring: the reference, and the fake kernel.

    Gradients are in csrc/autograd.cpp; without the extension they, and shapes for tracing, are
    those of the PyTorch functions that the reference calls.
    """
    if extension is None:
        _library.define(name + SCHEMAS[name])
        _library.impl(name, reference, "CompositeImplicitAutograd")
        return
    if not compiled_for("cuda"):
        _library.impl(name, reference, "CUDA")
    torch.library.register_fake(f"latentguard::{name}", fake, lib=_library)


def use_kernels(tensor: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether a call goes to the operator: a dtype and device it serves, no weight to train.

    Weights get their gradients through the reference, which is plain PyTorch.
    """
    if tensor.dtype not in DTYPES or tensor.device.type not in ("cpu", "cuda"):
        return False
    return not (torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights))


def fits(features: torch.Tensor, bank: torch.Tensor) -> bool:
    """Whether rows this wide fit the CUDA kernels' shared memory; the CPU takes any width."""
    widest = max(features.shape[-1], bank.shape[-1])
    return features.device.type != "cuda" or widest <= LARGEST_WIDTH
