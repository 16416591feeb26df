"""What the commands share that generate images: options, the generator, the arms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from latentguard.evaluate.generate.arms import Arm
    from latentguard.evaluate.generate.generators import Generator

Run = Annotated[Path, typer.Option(help="The run's folder; finished images are not made again.")]
Resume = Annotated[bool, typer.Option(help="Go on with the run in that folder.")]
Kind = Annotated[
    Literal["diffusers", "exact"],
    typer.Option(
        "--generator",
        help="diffusers: --pipeline. exact: the exact generator of --latents, without weights.",
    ),
]
Pipeline = Annotated[str | None, typer.Option(help="A folder of diffusers, or a name on the hub.")]
Config = Annotated[
    Path | None, typer.Option(help="A YAML file of these settings; options count over it.")
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Of the weights.")
]
Variant = Annotated[str | None, typer.Option(help="Of the weights' files, such as fp16.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")]
Offload = Annotated[
    Literal["none", "model", "sequential"] | None,
    typer.Option(help="Weights wait in the host's memory."),
]
Scheduler = Annotated[str | None, typer.Option(help="A scheduler class of diffusers.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale; without it the benchmark's own.")
]
Height = Annotated[int | None, typer.Option(min=8, help="In pixels; else the benchmark's own.")]
Width = Annotated[int | None, typer.Option(min=8, help="In pixels; else the benchmark's own.")]
Latents = Annotated[Path | None, typer.Option(help="The exact generator's set.")]
Labels = Annotated[
    Path | None, typer.Option(help="The class of each of --latents, one a line; else their ids.")
]
Loop = Annotated[
    Literal["sdxl", "flux2"], typer.Option(help="Whose loop the exact generator runs in.")
]
Leak = Annotated[
    float,
    typer.Option(min=0, max=1, help="What the exact generator's prompts leave to other classes."),
]
ArmNames = Annotated[
    list[str], typer.Option("--arm", help="none, block, steer, noise or sld; may be repeated.")
]
PolicyName = Annotated[
    str,
    typer.Option(help="Of block, steer and noise: a shipped policy's name, or a path."),
]
Model = Annotated[str, typer.Option(help="The encoder that the arms judge with.")]
Iterations = Annotated[int, typer.Option(min=0, help="Of the arm noise.")]
Sld = Annotated[
    Literal["weak", "medium", "strong", "max"],
    typer.Option(help="The published hyperparameters of the arm sld."),
]


def generator_of(
    kind: str,
    config: Path | None,
    latents: Path | None,
    labels: Path | None,
    loop: str,
    leak: float,
    **settings: Any,
) -> Generator:
    """What the command line says. Raises UsageError where options do not go together."""
    from latentguard.errors import UsageError
    from latentguard.evaluate.generate.settings import read_settings

    if kind == "diffusers":
        from latentguard.evaluate.generate.generators import PipelineGenerator

        if latents is not None or labels is not None:
            raise UsageError("--latents and --labels are of --generator exact")
        return PipelineGenerator(read_settings(config, settings))
    from latentguard.evaluate.generate.exact_generator import ExactGenerator

    steps, guidance = settings.pop("steps"), settings.pop("guidance")
    useless = [name for name, value in settings.items() if value is not None]
    if useless or config is not None:
        raise UsageError(
            f"--generator exact takes no --{[*useless, 'config'][0]}: it has --latents, --labels, "
            "--loop, --leak, --steps and --guidance"
        )
    if latents is None:
        raise UsageError("--generator exact needs --latents, such as examples/latents.pt")
    return ExactGenerator(latents, labels, loop=loop, steps=steps, guidance=guidance, leak=leak)


def arms_of(
    names: Sequence[str],
    generator: Generator,
    policy: str,
    model: str,
    iterations: int,
    sld: str,
) -> list[Arm]:
    from latentguard.errors import UsageError
    from latentguard.evaluate.generate.arms import (
        ARMS,
        Guarded,
        SafeLatentDiffusion,
        SearchedNoise,
        Unguarded,
    )
    from latentguard.policy import load_policy

    arms: list[Arm] = []
    for name in dict.fromkeys(names):
        if name == "none":
            arms.append(Unguarded(generator))
        elif name == "block":
            arms.append(Guarded(generator, load_policy(policy), "block", model))
        elif name == "steer":
            arms.append(Guarded(generator, load_policy(policy), "steer", model))
        elif name == "noise":
            arms.append(SearchedNoise(generator, load_policy(policy), model, iterations))
        elif name == "sld":
            arms.append(SafeLatentDiffusion(generator, sld))
        else:
            raise UsageError(f"there is no arm {name!r}: use {', '.join(ARMS)}")
    return arms
