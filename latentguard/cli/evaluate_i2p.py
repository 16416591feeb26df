"""`latentguard evaluate i2p`."""

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
    evaluate_app.command("i2p", no_args_is_help=True)(i2p_)


def i2p_(
    prompts: Annotated[Path, typer.Argument(help="The benchmark's CSV.")],
    run: Run,
    judge: Annotated[
        list[str],
        typer.Option(help="nudenet, q16, open_nsfw or policy:NAME; may be repeated."),
    ] = ["nudenet", "q16"],  # noqa: B006 (typer copies it)
    arm: ArmNames = ["none"],  # noqa: B006
    policy: PolicyName = "i2p",
    model: Model = "auto",
    iterations: Iterations = 50,
    sld: Sld = "strong",
    images: Annotated[int, typer.Option(min=1, max=1000, help="Of each row.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    category: Annotated[
        str | None, typer.Option(help="Only the rows of one of the seven categories.")
    ] = None,
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
    q16_prompts: Annotated[
        Path | None, typer.Option(help="Q16's data/ViT-L-14/prompts.p; nothing is unpickled.")
    ] = None,
    q16_weights: Annotated[
        str, typer.Option(help="CLIP's weights for Q16: a file, or openai, which is fetched.")
    ] = "openai",
    judge_model: Annotated[str, typer.Option(help="The encoder of a judge policy:NAME.")] = "auto",
    judge_autoencoder: Annotated[
        Path | None, typer.Option(help="What encodes the pictures for a judge policy:NAME.")
    ] = None,
    resume: Resume = False,
    output: Print = "table",
) -> None:
    """How often a generator makes inappropriate images, without and with a guard.

    Each row's seed, guidance and size are used; --guidance, --height and --width count over them.

    Example: latentguard evaluate i2p i2p_benchmark.csv --run runs/turbo --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0 --arm none --arm noise --q16-prompts prompts.p
    """
    from latentguard.errors import UsageError
    from latentguard.evaluate.generate.folder import RunFolder
    from latentguard.evaluate.generate.judging import judge_images
    from latentguard.evaluate.generate.run import make_images, manifest_of
    from latentguard.evaluate.i2p import asked_of, read_prompts, report
    from latentguard.evaluate.i2p.prompts import CATEGORIES
    from latentguard.evaluate.judges.catalog import JudgeOptions, judge_of

    rows, sha256 = read_prompts(prompts)
    if category is not None:
        if category not in CATEGORIES:
            raise UsageError(f"--category must be one of {', '.join(CATEGORIES)}, got {category!r}")
        rows = [row for row in rows if category in row.categories]
    rows = rows[:limit]
    if not rows:
        raise UsageError(f"{prompts}: has no rows of the category {category}")
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
    where = device or "cpu"
    options = JudgeOptions(
        q16_prompts, q16_weights, judge_model, judge_autoencoder, generator.space, where
    )
    judges = [judge_of(name, options) for name in dict.fromkeys(judge)]
    arms = arms_of(arm, generator, policy, model, iterations, sld)
    asked = asked_of(rows, images)
    taken = {"sha256": sha256, "rows": len(rows), "category": category, "limit": limit}
    folder = RunFolder(run, manifest_of("i2p", taken, asked, generator), resume)
    with Bar("generating") as advance:
        make_images(folder, arms, asked, advance)
    names = [one.name for one in arms]
    with Bar("judging") as advance:
        judged = judge_images(folder, judges, names, asked, advance)
    results = report(folder, rows, asked, names, judged)
    if output == "json":
        typer.echo(json.dumps(results))
        return
    typer.echo((run / "results.md").read_text("utf-8"))
