"""`latentguard evaluate bias`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.evaluate import evaluate_app
from latentguard.cli.generating import Generation, JudgeAutoencoder, JudgeModel, generating


def register(app: typer.Typer) -> None:
    """Add the command to those of `evaluate`."""
    evaluate_app.command("bias", no_args_is_help=True)(bias_)


@generating(arm="block")
def bias_(
    given: Generation,
    scenes: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML file of scenes and groups. Without it the bundled list is used."
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Also count the images that this judge flags: nudenet, open_nsfw or policy:NAME. "
            "May be repeated."
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(min=1, max=1000, help="Number of images for each scene and group."),
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image.")] = 0,
    judge_model: JudgeModel = "auto",
    judge_autoencoder: JudgeAutoencoder = None,
) -> None:
    """Measure how much more often a guard blocks, or a judge flags, one group than another.

    Example: latentguard evaluate bias --run runs/bias --pipeline
    stabilityai/stable-diffusion-xl-base-1.0 --policy family --arm block
    """
    from latentguard.evaluate.bias import SHIPPED, asked_of, read_scenes, report
    from latentguard.evaluate.judges.catalog import JudgeOptions, judge_of

    listed, sha256 = read_scenes(scenes or SHIPPED)
    options = JudgeOptions(
        model=judge_model,
        autoencoder=judge_autoencoder,
        space=given.generator.space,
        device=given.where,
    )
    judges = [judge_of(name, options) for name in dict.fromkeys(judge or ())]
    asked = asked_of(listed, images, seed)
    taken = {"name": listed.name, "sha256": sha256, "seed": seed}
    folder = given.folder("bias", taken, asked)
    given.make(folder, asked)
    judged = given.judge(folder, judges, asked)
    given.show(report(folder, listed, asked, given.names, judged))
