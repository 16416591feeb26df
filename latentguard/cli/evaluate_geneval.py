"""`latentguard evaluate geneval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

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
    evaluate_app.command("geneval", no_args_is_help=True)(geneval_)


def geneval_(
    prompts: Annotated[Path, typer.Argument(help="The benchmark's evaluation_metadata.jsonl.")],
    run: Run,
    evaluator: Annotated[
        Literal["builtin", "none"],
        typer.Option(
            help="builtin: torchvision's Mask R-CNN, not the official evaluator. none: make the "
            "images in the layout that GenEval's own reads."
        ),
    ] = "builtin",
    detector: Annotated[
        str,
        typer.Option(
            help="Weights of the built-in evaluator: a file, or torchvision, which fetches them."
        ),
    ] = "torchvision",
    arm: ArmNames = ["none"],  # noqa: B006 (typer copies it)
    policy: PolicyName = "default",
    model: Model = "auto",
    iterations: Iterations = 50,
    sld: Sld = "strong",
    images: Annotated[int, typer.Option(min=1, max=1000, help="Of each prompt.")] = 4,
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
    """How often images show the objects, numbers, colors and places that a prompt asks for.

    RUN/images/ARM has GenEval's own layout, so that its official evaluator can read it.

    Example: latentguard evaluate geneval evaluation_metadata.jsonl --run runs/geneval --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0 --evaluator none
    """
    from latentguard.evaluate.generate.folder import RunFolder
    from latentguard.evaluate.generate.judging import judge_images
    from latentguard.evaluate.generate.run import make_images, manifest_of
    from latentguard.evaluate.geneval import asked_of, read_prompts, write_grids, write_metadata
    from latentguard.evaluate.geneval.report import report

    lines, sha256 = read_prompts(prompts)
    lines = lines[:limit]
    judge = None
    if evaluator == "builtin":
        from latentguard.evaluate.geneval.detector import BuiltInEvaluator

        judge = BuiltInEvaluator(detector, device or "cpu")
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
    folder = RunFolder(run, manifest_of("geneval", taken, asked, generator), resume)
    names = [one.name for one in arms]
    for name in names:
        write_metadata(run / "images" / name, lines)
    with Bar("generating") as advance:
        make_images(folder, arms, asked, advance)
    for name in names:
        write_grids(run / "images" / name, lines, images)
    said = {}
    if judge is not None:
        with Bar("evaluating") as advance:
            judged = judge_images(folder, [judge], names, asked, advance)
        said = {name: judged[judge.name, name] for name in names}
    results = report(folder, lines, asked, names, said)
    if output == "json":
        typer.echo(json.dumps(results))
        return
    typer.echo((run / "results.md").read_text("utf-8"))
