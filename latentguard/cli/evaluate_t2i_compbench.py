"""`latentguard evaluate t2i-compbench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.bar import Bar
from latentguard.cli.evaluate import Print, evaluate_app
from latentguard.cli.generating import (
    ArmNames,
    Config,
    Device,
    Dtype,
    Guidance,
    Height,
    Iterations,
    Kind,
    Labels,
    Latents,
    Leak,
    Loop,
    Model,
    Offload,
    Pipeline,
    PolicyName,
    Resume,
    Run,
    Scheduler,
    Sld,
    Steps,
    Variant,
    Width,
    arms_of,
    generator_of,
)


def register(app: typer.Typer) -> None:
    """Add the command to those of `evaluate`."""
    evaluate_app.command("t2i-compbench", no_args_is_help=True)(t2i_compbench_)


def t2i_compbench_(
    prompts: Annotated[Path, typer.Argument(help="One of the benchmark's prompt files.")],
    run: Run,
    arm: ArmNames = ["none"],  # noqa: B006 (typer copies it)
    policy: PolicyName = "default",
    model: Model = "auto",
    iterations: Iterations = 50,
    sld: Sld = "strong",
    images: Annotated[int, typer.Option(min=1, max=1000, help="Of each prompt.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image of each prompt.")] = 42,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    kind: Kind = "diffusers",
    pipeline: Pipeline = None,
    config: Config = None,
    dtype: Dtype = None,
    variant: Variant = None,
    device: Device = None,
    offload: Offload = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    latents: Latents = None,
    labels: Labels = None,
    loop: Loop = "sdxl",
    leak: Leak = 0.0,
    resume: Resume = False,
    output: Print = "table",
) -> None:
    """Make the images of T2I-CompBench, in the folder that its own evaluators read.

    RUN/images/ARM/samples has PROMPT_000000.png. Nothing is evaluated here.

    Example: latentguard evaluate t2i-compbench color_val.txt --run runs/color --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0
    """
    from latentguard.evaluate.generate.folder import RunFolder
    from latentguard.evaluate.generate.run import make_images, manifest_of
    from latentguard.evaluate.t2i_compbench import asked_of, read_prompts, report

    lines, sha256 = read_prompts(prompts)
    lines = lines[:limit]
    generator = generator_of(
        kind,
        config,
        latents,
        labels,
        loop,
        leak,
        pipeline=pipeline,
        dtype=dtype,
        variant=variant,
        device=device,
        offload=offload,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
    )
    arms = arms_of(arm, generator, policy, model, iterations, sld)
    asked = asked_of(lines, images, seed)
    taken = {"sha256": sha256, "prompts": len(lines), "limit": limit, "seed": seed}
    folder = RunFolder(run, manifest_of("t2i-compbench", taken, asked, generator), resume)
    with Bar("generating") as advance:
        make_images(folder, arms, asked, advance)
    results = report(folder, asked, [one.name for one in arms])
    if output == "json":
        typer.echo(json.dumps(results))
        return
    typer.echo((run / "results.md").read_text("utf-8"))
