"""Random arguments for the operators, back ends that compute them, and the tolerances."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import host_runner
import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.ops import library, reference

EPS = 1e-5
# Norm-wise relative, against float64 from the same (rounded) inputs. Half types are rounded once at
# the end on the CPU, and at every operand of a tensor core on CUDA. Worst measured, over outputs
# and gradients of the cases in test_operators.py: 7.3e-7, 2.6e-4, 1.9e-3 (CPU); 3.0e-7, 3.1e-4,
# 2.8e-3 (CUDA kernels on the host layer).
RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Margins are differences of cosines: absolute. Worst measured: 1.5e-7 on the CPU in every dtype;
# 2.5e-7, 1.3e-4, 1.8e-3 (CUDA kernels on the host layer).
MARGIN = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(RELATIVE)

needs_extension = library.extension is None
EXTENSION_REASON = f"needs the compiled extension: {library.missing}"


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    difference = (got.double().cpu() - want.double().cpu()).norm()
    return float(difference / want.double().norm().clamp_min(1e-30))


@dataclasses.dataclass(frozen=True)
class Patch:
    """One shape of patch_embed."""

    batch: int = 2
    channels: int = 4
    height: int = 8
    width: int = 12
    patch: int = 4
    dim: int = 64
    packed: bool = False
    affine: bool = True
    noise: bool = True

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | float | None]:
        """Keyword arguments on the CPU; grads and outputs of ordinary size."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        size = self.channels * self.patch**2
        tokens = (self.height // self.patch) * (self.width // self.patch)
        shape = (self.batch, self.channels, self.height, self.width)
        values = self.channels * (4 if self.packed else 1)
        return {
            "latents": normal(*shape),
            "weight": normal(self.dim, self.channels, self.patch, self.patch) / size**0.5,
            "class_embedding": normal(self.dim),
            "positional_embedding": normal(1 + tokens, self.dim) * 0.5,
            "ln_weight": 1 + 0.2 * normal(self.dim),
            "ln_bias": 0.1 * normal(self.dim),
            "eps": EPS,
            "scale": torch.rand(values, generator=g) + 0.5 if self.affine else None,
            "shift": torch.randn(values, generator=g) if self.affine else None,
            "noise": normal(*shape) if self.noise else None,
            "alpha": torch.rand(self.batch, generator=g) + 0.5 if self.noise else None,
            "sigma": torch.rand(self.batch, generator=g) if self.noise else None,
        }


@dataclasses.dataclass(frozen=True)
class Match:
    """One shape of concept_similarity (positions 0) or concept_heatmap (positions N)."""

    rows: int = 3
    dim: int = 64
    width: int = 32
    prompts: int = 9
    contrasts: int = 5
    concepts: int = 3
    positions: int = 0
    norm: bool = True
    project: bool = True

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | float | None]:
        """Keyword arguments on the CPU without logit_scale."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        def bank(rows: int) -> Tensor:
            return F.normalize(torch.randn(rows, width, generator=g), dim=-1).to(dtype)

        def ranges(rows: int) -> Tensor:
            cuts = torch.linspace(0, rows, self.concepts + 1).round().int()
            return torch.stack((cuts[:-1], cuts[1:]), 1).contiguous()

        width = self.width if self.project else self.dim
        shape = (self.rows, self.positions, self.dim) if self.positions else (self.rows, self.dim)
        shared = torch.tensor([[0, self.contrasts]] * self.concepts, dtype=torch.int32)
        return {
            "features": normal(*shape),
            "ln_weight": 1 + 0.2 * normal(self.dim) if self.norm else None,
            "ln_bias": 0.1 * normal(self.dim) if self.norm else None,
            "eps": EPS,
            "projection": normal(self.dim, width) / self.dim**0.5 if self.project else None,
            "concepts": bank(self.prompts),
            "segments": ranges(self.prompts),
            "contrast": bank(self.contrasts),
            "contrast_segments": shared.view(-1, 2),
        }


@dataclasses.dataclass(frozen=True)
class Null:
    """One shape of null, the template operator: what a case of another operator has at least."""

    shape: tuple[int, ...] = (2, 3, 7)
    scale: float = 1.5

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | float | None]:
        """Keyword arguments on the CPU."""
        g = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(*self.shape, generator=g).to(dtype), "scale": self.scale}


def move(arguments: dict[str, Tensor | float | None], to: object) -> dict:  # type: ignore[type-arg]
    """Tensors to a device, or floating ones to a dtype."""
    return {
        k: v.to(to)
        if isinstance(v, Tensor) and (not isinstance(to, torch.dtype) or v.is_floating_point())
        else v
        for k, v in arguments.items()
    }


def poison(shape: object, dtype: torch.dtype) -> Tensor:
    """An output full of NaN (or nonsense indices): what no thread writes is seen."""
    out = torch.empty(shape, dtype=dtype)  # type: ignore[call-overload]
    return out.fill_(float("nan")) if dtype.is_floating_point else out.fill_(-777)


def _backward_arguments(a: dict) -> list:  # type: ignore[type-arg]
    keys = "features ln_weight eps projection concepts contrast"
    return [a[key] for key in keys.split()]


# Back ends. Each takes the arguments on the CPU and gives results on the CPU.


class Reference:
    """The plain PyTorch definition, in the dtype of the arguments."""

    name = "reference"

    def null(self, arguments: dict) -> Tensor:  # type: ignore[type-arg]
        return reference.null(**arguments)

    def null_backward(self, grad: Tensor, arguments: dict) -> Tensor:  # type: ignore[type-arg]
        return reference.null_backward(grad, arguments["scale"])

    def patch_embed(self, arguments: dict) -> Tensor:  # type: ignore[type-arg]
        return reference.patch_embed(**arguments)

    def patch_embed_backward(self, grad: Tensor, arguments: dict) -> Tensor:  # type: ignore[type-arg]
        rest = {k: v for k, v in arguments.items() if k not in ("class_embedding", "ln_bias")}
        return reference.patch_embed_backward(grad, **rest)

    def similarity(self, arguments: dict, scale: float) -> tuple[Tensor, ...]:  # type: ignore[type-arg]
        return reference.concept_similarity(*arguments.values(), scale, True)

    def similarity_backward(
        self, grads: tuple, arguments: dict, scale: float, out: tuple
    ) -> Tensor:  # type: ignore[type-arg]
        return reference.concept_similarity_backward(
            *grads, *_backward_arguments(arguments), out[0], *out[2:], scale
        )

    def heatmap(self, arguments: dict) -> tuple[Tensor, ...]:  # type: ignore[type-arg]
        return reference.concept_heatmap(*arguments.values(), True)

    def heatmap_without_saving(self, arguments: dict) -> Tensor:  # type: ignore[type-arg]
        return reference.concept_heatmap(*arguments.values())[0]

    def heatmap_backward(self, grad: Tensor, arguments: dict, out: tuple) -> Tensor:  # type: ignore[type-arg]
        head = _backward_arguments(arguments)
        return reference.concept_heatmap_backward(grad, *head, *out[1:])


class Operators(Reference):
    """torch.ops.latentguard on a device: compiled kernels, where there are any."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.name = f"operators on {device}"

    def _call(self, name: str, *arguments: object) -> object:
        moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in arguments]
        out = getattr(torch.ops.latentguard, name)(*moved)
        return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

    def null(self, arguments):  # type: ignore[no-untyped-def]
        return self._call("null", *arguments.values())

    def null_backward(self, grad, arguments):  # type: ignore[no-untyped-def]
        return self._call("null_backward", grad, arguments["scale"])

    def patch_embed(self, arguments):  # type: ignore[no-untyped-def]
        return self._call("patch_embed", *arguments.values())

    def patch_embed_backward(self, grad, arguments):  # type: ignore[no-untyped-def]
        rest = {k: v for k, v in arguments.items() if k not in ("class_embedding", "ln_bias")}
        return self._call("patch_embed_backward", grad, *rest.values())

    def similarity(self, arguments, scale):  # type: ignore[no-untyped-def]
        return self._call("concept_similarity", *arguments.values(), scale, True)

    def similarity_backward(self, grads, arguments, scale, out):  # type: ignore[no-untyped-def]
        head = _backward_arguments(arguments)
        saved = (out[0], *out[2:])
        return self._call("concept_similarity_backward", *grads, *head, *saved, scale)

    def heatmap(self, arguments):  # type: ignore[no-untyped-def]
        return self._call("concept_heatmap", *arguments.values(), True)

    def heatmap_without_saving(self, arguments):  # type: ignore[no-untyped-def]
        return self._call("concept_heatmap", *arguments.values(), False)[0]

    def heatmap_backward(self, grad, arguments, out):  # type: ignore[no-untyped-def]
        head = _backward_arguments(arguments)
        return self._call("concept_heatmap_backward", grad, *head, *out[1:])


class HostCuda(Reference):
    """The CUDA kernels on the host execution layer, under the sanitizers."""

    name = "CUDA kernels on the host layer"

    # Rows up to which two launches share the work; None is the launcher's own choice.
    split_rows: int | None = None

    def __init__(self, runner: Path) -> None:
        self.runner = runner

    def null(self, arguments):  # type: ignore[no-untyped-def]
        x = arguments["x"]
        numbers = [host_runner.TYPES[x.dtype], x.numel(), arguments["scale"]]
        # The output starts as poison: an element that no thread writes is seen.
        return host_runner.run(self.runner, 4, numbers, [x, poison(x.shape, x.dtype)])[1]

    def null_backward(self, grad, arguments):  # type: ignore[no-untyped-def]
        return self.null(arguments | {"x": grad})

    def _patch(self, operation: int, a: dict, grad: Tensor | None, out: Tensor) -> Tensor:  # type: ignore[type-arg]
        x, weight = a["latents"], a["weight"]
        channels = x.shape[1]
        phases = [1 if a[k] is None else a[k].shape[0] // channels for k in ("scale", "shift")]
        numbers = [host_runner.TYPES[x.dtype], *x.shape, weight.shape[2], weight.shape[0]]
        keys = "latents noise weight class_embedding positional_embedding ln_weight ln_bias"
        arrays = [a[k] for k in (*keys.split(), "scale", "shift", "alpha", "sigma")]
        arrays += [grad, *((None, out) if operation else (out, None))]
        done = host_runner.run(self.runner, operation, [*numbers, *phases, a["eps"]], arrays)
        got = done[13 if operation else 12]
        assert got is not None
        return got

    def patch_embed(self, arguments):  # type: ignore[no-untyped-def]
        x, weight = arguments["latents"], arguments["weight"]
        tokens = arguments["positional_embedding"].shape[0]
        out = poison((x.shape[0], tokens, weight.shape[0]), x.dtype)
        return self._patch(0, arguments, None, out)

    def patch_embed_backward(self, grad, arguments):  # type: ignore[no-untyped-def]
        x = arguments["latents"]
        return self._patch(1, arguments, grad, poison(x.shape, x.dtype))

    def _concepts(self, operation, a, scale, shape, extra):  # type: ignore[no-untyped-def]
        x = a["features"]
        rows = x.numel() // x.shape[-1]
        positions = x.shape[1] if x.dim() == 3 else 1
        concepts = a["segments"].shape[0]
        numbers = [host_runner.TYPES[x.dtype], rows, positions, x.shape[-1], a["concepts"].shape[1]]
        numbers += [a["concepts"].shape[0], a["contrast"].shape[0], concepts, a["eps"], scale]
        numbers.append(-1 if self.split_rows is None else self.split_rows)
        keys = "features ln_weight ln_bias projection concepts contrast segments contrast_segments"
        arrays = [a[k] for k in keys.split()] + extra
        return host_runner.run(self.runner, operation, numbers, arrays)

    def similarity(self, arguments, scale):  # type: ignore[no-untyped-def]
        x = arguments["features"]
        shape = (x.shape[0], arguments["segments"].shape[0])
        outs = [poison(shape, d) for d in (torch.float32, torch.float32, torch.int64, torch.int64)]
        rows = poison((x.shape[0], arguments["concepts"].shape[1]), x.dtype)
        done = self._concepts(2, arguments, scale, shape, [*outs, None, None, None, rows])
        return (*done[8:12], done[15])

    def similarity_backward(self, grads, arguments, scale, out):  # type: ignore[no-untyped-def]
        x = arguments["features"]
        extra = [out[0], None, out[2], out[3], *grads, poison(x.shape, x.dtype), out[4]]
        return self._concepts(3, arguments, scale, None, extra)[14]

    def heatmap(self, arguments):  # type: ignore[no-untyped-def]
        x, concepts = arguments["features"], arguments["segments"].shape[0]
        shape = (x.shape[0], concepts, x.shape[1])
        outs = [poison(shape, torch.float32)] + [poison(shape, torch.int64) for _ in range(2)]
        rows = poison((*x.shape[:-1], arguments["concepts"].shape[1]), x.dtype)
        done = self._concepts(2, arguments, 1.0, None, [None, *outs, None, None, None, rows])
        return (*done[9:12], done[15])

    def heatmap_without_saving(self, arguments):  # type: ignore[no-untyped-def]
        x, concepts = arguments["features"], arguments["segments"].shape[0]
        out = poison((x.shape[0], concepts, x.shape[1]), torch.float32)
        return self._concepts(2, arguments, 1.0, None, [None, out, *(None,) * 6])[9]

    def heatmap_backward(self, grad, arguments, out):  # type: ignore[no-untyped-def]
        x = arguments["features"]
        extra = [None, None, out[1], out[2], None, grad, poison(x.shape, x.dtype), out[3]]
        return self._concepts(3, arguments, 1.0, None, extra)[14]


def host_layer_missing() -> str:
    """Why the host layer cannot be built here, or nothing."""
    from shutil import which

    compiler = os.environ.get("CXX", "c++")
    return "" if which(compiler) else f"needs a C++ compiler ({compiler})"


Backend = Callable[[], Reference]
