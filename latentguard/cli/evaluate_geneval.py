"""`latentguard evaluate geneval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from latentguard.cli.evaluate import evaluate_app
from latentguard.cli.generating import Generation, generating


def register(app: typer.Typer) -> None:
    """Add the command to those of `evaluate`."""
    evaluate_app.command("geneval", no_args_is_help=True)(geneval_)


@generating()
def geneval_(
    given: Generation,
    prompts: Annotated[Path, typer.Argument(help="The benchmark's evaluation_metadata.jsonl.")],
    evaluator: Annotated[
        Literal["builtin", "none"],
        typer.Option(
            help="builtin: evaluate with torchvision's Mask R-CNN, which is not the official "
            "evaluator. none: only make the images, in the layout that the official one reads."
        ),
    ] = "builtin",
    detector: Annotated[
        str,
        typer.Option(
            help="Weights of the built-in evaluator: a file, or torchvision, which downloads them."
        ),
    ] = "torchvision",
    images: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of images to generate for each prompt.")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image of each prompt.")] = 42,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many prompts, from the first.")
    ] = None,
) -> None:
    """Measure how often images show the objects, counts, colors and positions of their prompts.

    RUN/images/ARM has GenEval's own layout, so that its official evaluator can read it.

    Example: latentguard evaluate geneval evaluation_metadata.jsonl --run runs/geneval --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0 --evaluator none
    """
    from latentguard.evaluate.geneval import asked_of, read_prompts, write_grids, write_metadata
    from latentguard.evaluate.geneval.report import report

    lines, sha256 = read_prompts(prompts)
    lines = lines[:limit]
    judge = None
    if evaluator == "builtin":
        from latentguard.evaluate.geneval.detector import BuiltInEvaluator

        judge = BuiltInEvaluator(detector, given.where)
    asked = asked_of(lines, images, seed)
    taken = {"sha256": sha256, "prompts": len(lines), "limit": limit, "seed": seed}
    folder = given.folder("geneval", taken, asked)
    arms = [given.run / "images" / name for name in given.names]
    for arm in arms:
        write_metadata(arm, lines)
    given.make(folder, asked)
    for arm in arms:
        write_grids(arm, lines, images)
    said = {}
    if judge is not None:
        judged = given.judge(folder, [judge], asked)
        said = {name: judged[judge.name, name] for name in given.names}
    given.show(report(folder, lines, asked, given.names, said))
