"""The three config.pbtxt of a Triton model repository.

(The schema: model_config.proto of https://github.com/triton-inference-server/common.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from latentguard.errors import ModelError

Device = Literal["auto", "cpu", "gpu"]

_STRING = "TYPE_STRING"
# Latent cells that a model of open size is warmed up on: 512 and 1024 pixels.
_SIDES = (64, 128)
# What the decision step reads of the scores, and gives back with the rows of images that are not
# finite blotted out.
_READ = ("probability", "margin", "best_prompt")
_GIVEN = ("probability", "margin")


class Tensor(NamedTuple):
    """An input or output: its name, its type in Triton's words, its sizes without the batch."""

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class TritonOptions:
    """How a repository is served.

    name: the model that clients call; the steps are NAME_scores and NAME_decision.
    version: of all three models; the ensemble joins steps of the same version only.
    max_batch: images a request, and a batch.
    preferred: batch sizes that are run at once, without waiting for more.
    max_delay_ms: how long a request waits for others.
    queue: requests that may wait; a further one is an error, so that overload is seen.
    timeout_ms: how long a request may wait before it is an error.
    device, instances: where the scores are computed, and by how many instances (on each GPU).
    threads: of an instance on the CPU; None leaves it to ONNX Runtime.
    """

    name: str = "latentguard"
    version: int = 1
    max_batch: int = 32
    preferred: tuple[int, ...] = (8, 16)
    max_delay_ms: float = 2.0
    queue: int = 256
    timeout_ms: float = 10_000.0
    device: Device = "auto"
    instances: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,100}", self.name):
            raise ModelError(
                f"the model's name must be letters, digits, '_', '.' and '-', got {self.name!r}"
            )
        for what in ("version", "max_batch", "queue", "instances"):
            if getattr(self, what) < 1:
                raise ModelError(f"{what} must be at least 1, got {getattr(self, what)}")
        if self.threads is not None and self.threads < 1:
            raise ModelError(f"threads must be at least 1, got {self.threads}")
        if not all(1 <= size <= self.max_batch for size in self.preferred):
            raise ModelError(
                f"preferred batch sizes must be 1 to {self.max_batch} (the largest batch), got "
                f"{list(self.preferred)}"
            )
        if not 0 <= self.max_delay_ms < self.timeout_ms:
            raise ModelError(
                f"a request may wait {self.max_delay_ms:g} ms for others, which must be less than "
                f"its timeout of {self.timeout_ms:g} ms"
            )

    @property
    def models(self) -> tuple[str, str, str]:
        """The ensemble, and its two steps."""
        return self.name, f"{self.name}_scores", f"{self.name}_decision"


def scores_config(
    options: TritonOptions,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    rules: Mapping[str, Any],
) -> str:
    """The step that runs the .onnx file."""
    policy, model = rules["policy"], rules["model"]
    about = {
        "sha256": rules["sha256"],
        "policy": f"{policy['name']} {policy['version']}",
        "model": f"{model['name']} {model['sha256']}",
        "space": rules["space"],
        "scaled": str(rules["scaled"]).lower(),
    }
    if options.threads is not None:
        about["intra_op_thread_count"] = str(options.threads)
    return _text(
        [
            *_head(options.models[1], options, 'backend: "onnxruntime"', inputs, outputs),
            *_group(f"KIND_{options.device.upper()}", options.instances),
            "dynamic_batching {",
            *(f"  preferred_batch_size: {size}" for size in sorted({*options.preferred})),
            f"  max_queue_delay_microseconds: {round(options.max_delay_ms * 1e3)}",
            "  default_queue_policy {",
            "    timeout_action: REJECT",
            f"    default_timeout_microseconds: {round(options.timeout_ms * 1e3)}",
            f"    max_queue_size: {options.queue}",
            "  }",
            "}",
            *_warm_up(inputs[0], sorted({1, *options.preferred})),
            *_parameters(about),
        ]
    )


def decision_config(
    options: TritonOptions, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> str:
    """The step that turns scores into verdicts."""
    by_name = {tensor.name: tensor for tensor in outputs}
    return _text(
        [
            *_head(
                options.models[2],
                options,
                'backend: "python"',
                [*inputs, *(by_name[name] for name in _READ)],
                [*_verdicts(), *(by_name[name] for name in _GIVEN)],
            ),
            *_group("KIND_CPU", options.instances),
        ]
    )


def ensemble_config(
    options: TritonOptions, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> str:
    """What clients call: latents in, decision, verdict and scores out."""
    _, scores, decision = options.models
    passed = [tensor for tensor in outputs if tensor.name not in _READ]
    raw = {name: f"{name}_of_the_graph" for name in _READ}
    given = [tensor for tensor in outputs if tensor.name in _GIVEN]
    read = {tensor.name: tensor.name for tensor in inputs}
    return _text(
        [
            *_head(
                options.name,
                options,
                'platform: "ensemble"',
                inputs,
                [*_verdicts(), *given, *passed],
            ),
            "ensemble_scheduling {",
            *_step(scores, options, read, {t.name: raw.get(t.name, t.name) for t in outputs}),
            *_step(
                decision,
                options,
                read | raw,
                {name: name for name in ("decision", "verdict", *_GIVEN)},
            ),
            "}",
        ]
    )


def _verdicts() -> list[Tensor]:
    return [Tensor("decision", _STRING, (1,)), Tensor("verdict", _STRING, (1,))]


def _head(
    name: str,
    options: TritonOptions,
    kind: str,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
) -> list[str]:
    lines = [
        f'name: "{name}"',
        kind,
        f"max_batch_size: {options.max_batch}",
        f"version_policy {{ specific {{ versions: {options.version} }} }}",
    ]
    for word, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            lines += [
                f"{word} {{",
                f'  name: "{tensor.name}"',
                f"  data_type: {tensor.type}",
                f"  dims: [{', '.join(map(str, tensor.dims))}]",
                "}",
            ]
    return lines


def _group(kind: str, count: int) -> list[str]:
    return ["instance_group {", f"  kind: {kind}", f"  count: {count}", "}"]


def _warm_up(latents: Tensor, sizes: Sequence[int]) -> list[str]:
    """Zeros of each batch size that will be common, so that no client waits for the first run."""
    channels, height, width = latents.dims
    sides = _SIDES if -1 in (height, width) else (None,)
    lines = []
    for side in sides:
        for size in sizes:
            dims = (channels, *(side if side and d == -1 else d for d in (height, width)))
            lines += [
                "model_warmup {",
                f'  name: "{size} of {dims[1]}x{dims[2]}"',
                f"  batch_size: {size}",
                "  inputs {",
                f'    key: "{latents.name}"',
                f"    value {{ data_type: {latents.type} dims: [{', '.join(map(str, dims))}] "
                "zero_data: true }",
                "  }",
                "}",
            ]
    return lines


def _parameters(values: Mapping[str, str]) -> list[str]:
    return [
        f'parameters {{ key: "{key}" value {{ string_value: "{_quoted(value)}" }} }}'
        for key, value in values.items()
    ]


def _step(
    model: str, options: TritonOptions, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> list[str]:
    lines = ["  step {", f'    model_name: "{model}"', f"    model_version: {options.version}"]
    for word, names in (("input_map", inputs), ("output_map", outputs)):
        lines += [f'    {word} {{ key: "{key}" value: "{value}" }}' for key, value in names.items()]
    return [*lines, "  }"]


def _quoted(value: str) -> str:
    """Inside of a text format's string: policies may be called whatever their author likes."""
    return "".join(
        character
        if " " <= character <= "~" and character not in '"\\'
        else "".join(f"\\{byte:03o}" for byte in character.encode())
        for character in value
    )


def _text(lines: Iterable[str]) -> str:
    return "\n".join(["# Written by `latentguard export triton`.", *lines, ""])
