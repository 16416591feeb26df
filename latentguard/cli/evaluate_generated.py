"""`latentguard evaluate i2p`, `geneval`, `t2i-compbench`: benchmarks that generate images first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentguard.cli.bar import Bar
from latentguard.cli.evaluate import Print, evaluate_app

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


def register(app: typer.Typer) -> None:
    """Add the commands to those of `evaluate`."""
    evaluate_app.command("i2p", no_args_is_help=True)(i2p_)
    evaluate_app.command("geneval", no_args_is_help=True)(geneval_)
    evaluate_app.command("t2i-compbench", no_args_is_help=True)(t2i_compbench_)


def _generator(
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


def _arms(
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
    generator = _generator(
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
    arms = _arms(arm, generator, policy, model, iterations, sld)
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
    generator = _generator(
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
    arms = _arms(arm, generator, policy, model, iterations, sld)
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
    generator = _generator(
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
    arms = _arms(arm, generator, policy, model, iterations, sld)
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
