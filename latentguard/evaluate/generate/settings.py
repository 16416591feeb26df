"""How a pipeline is to run: from the command line, from a YAML file, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from latentguard.errors import PolicyError, UsageError
from latentguard.yaml_nodes import compose, read_bytes

DTYPES = ("float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential")


@dataclass(frozen=True)
class Settings:
    """How a pipeline is to run.

    pipeline: a folder that diffusers wrote, or a name on the Hugging Face hub.
    vae: an AutoencoderKL that takes the place of the pipeline's own, by folder or name on the hub.
    dtype: float32, float16 or bfloat16. variant: of the weights' files, such as fp16.
    device: such as cpu or cuda:0; None is a GPU where there is one.
    offload: none, model or sequential: weights wait in the host's memory.
    scheduler: a class of diffusers that takes the place of the pipeline's own, made from the
        latter's configuration with `scheduler_options` over it.
    steps, guidance, height, width: None is the benchmark's, or else the pipeline's own.
    call: further arguments of the pipeline's call.
    """

    pipeline: str
    vae: str | None = None
    dtype: str = "float32"
    variant: str | None = None
    device: str | None = None
    offload: str = "none"
    scheduler: str | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("offload", OFFLOADS)):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.vae is not None and not isinstance(self.vae, str):
            raise UsageError(f"vae must be a folder or a name on the hub, got {self.vae!r}")
        for name in ("steps", "height", "width"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.guidance is not None and not isinstance(self.guidance, int | float):
            raise UsageError(f"guidance must be a number, got {self.guidance!r}")
        for name in ("scheduler_options", "call"):
            if not isinstance(getattr(self, name), Mapping):
                raise UsageError(f"{name} must be a mapping, got {getattr(self, name)!r}")


def read_settings(path: Path | None, given: Mapping[str, Any]) -> Settings:
    """Settings from a YAML file and from options, which count where both say something.

    given: options by the name of their field; None is not given.

    Raises UsageError for a file that cannot be read, an unknown key, and a missing pipeline.
    """
    said = {name: value for name, value in given.items() if value is not None}
    if path is not None:
        said = _read(path) | said
    if not isinstance(said.get("pipeline"), str):
        raise UsageError(
            "no pipeline: give --pipeline with a folder of diffusers or a name on the hub, or "
            "--generator exact, which needs no weights"
        )
    return replace(Settings(said["pipeline"]), **said)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = compose(read_bytes(path), str(path)).plain()
    except PolicyError as error:
        raise UsageError(str(error)) from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must be a mapping with a pipeline and how it is to run")
    known = [item.name for item in fields(Settings)]
    for key in values:
        if key not in known:
            raise UsageError(f"{path}: no such setting {key!r}: use {', '.join(known)}")
    return values
