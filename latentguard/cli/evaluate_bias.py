"""`latentguard evaluate bias`."""

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
    evaluate_app.command("bias", no_args_is_help=True)(bias_)


def bias_(
    run: Run,
    scenes: Annotated[
        Path | None,
        typer.Argument(help="A YAML file of scenes and groups; without it the list that ships."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="Also what nudenet, open_nsfw or policy:NAME flags; may be repeated."),
    ] = None,
    arm: ArmNames = ["block"],  # noqa: B006 (typer copies it)
    policy: PolicyName = "default",
    model: Model = "auto",
    iterations: Iterations = 50,
    sld: Sld = "strong",
    images: Annotated[int, typer.Option(min=1, max=1000, help="Of each scene and group.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image.")] = 0,
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
    judge_model: Annotated[str, typer.Option(help="The encoder of a judge policy:NAME.")] = "auto",
    judge_autoencoder: Annotated[
        Path | None, typer.Option(help="What encodes the pictures for a judge policy:NAME.")
    ] = None,
) -> None:
    """How much more often a guard blocks, or a judge flags, one group of people than another.

    Example: latentguard evaluate bias --run runs/bias --pipeline
    stabilityai/stable-diffusion-xl-base-1.0 --policy family --arm block
    """
    from latentguard.evaluate.bias import SHIPPED, asked_of, read_scenes, report
    from latentguard.evaluate.generate.folder import RunFolder
    from latentguard.evaluate.generate.judging import judge_images
    from latentguard.evaluate.generate.run import make_images, manifest_of
    from latentguard.evaluate.judges.catalog import JudgeOptions, judge_of

    listed, sha256 = read_scenes(scenes or SHIPPED)
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
    options = JudgeOptions(
        model=judge_model,
        autoencoder=judge_autoencoder,
        space=generator.space,
        device=device or "cpu",
    )
    judges = [judge_of(name, options) for name in dict.fromkeys(judge or ())]
    arms = arms_of(arm, generator, policy, model, iterations, sld)
    asked = asked_of(listed, images, seed)
    taken = {"name": listed.name, "sha256": sha256, "seed": seed}
    folder = RunFolder(run, manifest_of("bias", taken, asked, generator), resume)
    names = [one.name for one in arms]
    with Bar("generating") as advance:
        make_images(folder, arms, asked, advance)
    with Bar("judging") as advance:
        judged = judge_images(folder, judges, names, asked, advance)
    results = report(folder, listed, asked, names, judged)
    if output == "json":
        typer.echo(json.dumps(results))
        return
    typer.echo((run / "results.md").read_text("utf-8"))
