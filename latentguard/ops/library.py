"""Where the operators' schemas meet their kernels.

Each operator's file (latentguard/ops/X.py) gives its schema. The compiled extension
`latentguard._C` registers CPU (and CUDA) kernels and gradients for them; torch compares their C++
types with the schema. Where the extension is absent, or has no kernel, the reference is registered
in its place, so that `torch.ops.latentguard` looks the same on every machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch

from latentguard.ops import build_info
from latentguard.ops.arguments import flat

# Every operator's schema and, of those that have one, its ONNX translation, by name; filled by
# `register`, which each operator's file calls.
SCHEMAS: dict[str, str] = {}
TRANSLATIONS: dict[str, Callable[..., Any]] = {}

# As kLargestWidth in csrc/include/concepts.h.
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
_library: Any = torch.library.Library("latentguard", "DEF")  # type: ignore[no-untyped-call]


def compiled_for(device: str) -> bool:
    """Whether kernels of our own exist for a device type."""
    return extension is not None and (device == "cpu" or bool(extension.build_info()["cuda"]))


def register(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    onnx: Callable[..., Any] | None = None,
) -> None:
    """Define one operator and give it what its kernels do not bring.

    All functions may take the structures of `arguments`. Gradients are in csrc/ops; without a
    kernel they, and shapes for tracing, are those of the PyTorch functions that the reference
    calls.

    Args:
        schema: the arguments and results, "(Tensor x, ...) -> Tensor": the only place they stand.
        reference: the operator in plain PyTorch, with its checks.
        fake: results of the right shape and dtype with nothing in them.
        onnx: the operator in standard ONNX operators; a backward has none.
    """
    SCHEMAS[name] = schema
    if onnx is not None:
        TRANSLATIONS[name] = flat(onnx)
    _library.define(name + schema)
    plain = flat(reference)
    if not _has_kernel(name, "CPU"):
        _library.impl(name, plain, "CompositeExplicitAutograd")
        _library.impl(name, _differentiable(name, plain), "Autograd")
    elif not _has_kernel(name, "CUDA"):
        _library.impl(name, plain, "CUDA")
    torch.library.register_fake(f"latentguard::{name}", flat(fake), lib=_library)


def _differentiable(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A reference with the gradients of the PyTorch functions that it calls, where one is wanted.

    Else the operator stays one: an export translates it as a whole, and its sizes stay open.
    """

    def call(*arguments: Any) -> Any:
        tensors = (a for a in arguments if isinstance(a, torch.Tensor))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return plain(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.latentguard, name)(*arguments)

    return call


def _has_kernel(name: str, key: str) -> bool:
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"latentguard::{name}", key)
    return found


def use_kernels(tensor: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether a call goes to the operator: a dtype and device it serves, no weight to train.

    Weights get their gradients through the reference, which is plain PyTorch.
    """
    if tensor.dtype not in DTYPES or tensor.device.type not in ("cpu", "cuda"):
        return False
    return not (torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights))


def fits(device: torch.device, width: int, beside: int) -> bool:
    """Whether 16 rows of floats fit the shared memory of a block of CUDA's kernels; the CPU takes
    any width.

    beside: bytes that the kernel needs besides.
    """
    if device.type != "cuda":
        return True
    return width <= LARGEST_WIDTH and 64 * (width + 4) + beside <= _shared_memory(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shared_memory(device: torch.device) -> int:
    """Bytes that a GPU grants a block; 0 for one that the kernels are not compiled for."""
    about = cast(Any, torch.cuda.get_device_properties(device))  # stubs lack a field
    return int(about.shared_memory_per_block_optin) if about.major >= 8 else 0
