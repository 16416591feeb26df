"""`latentguard evaluate t2i-compbench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.evaluate import evaluate_app
from latentguard.cli.generating import Generation, generating


def register(app: typer.Typer) -> None:
    """Add the command to those of `evaluate`."""
    evaluate_app.command("t2i-compbench", no_args_is_help=True)(t2i_compbench_)


@generating()
def t2i_compbench_(
    given: Generation,
    prompts: Annotated[Path, typer.Argument(help="One of the benchmark's prompt files.")],
    images: Annotated[int, typer.Option(min=1, max=1000, help="Of each prompt.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image of each prompt.")] = 42,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
) -> None:
    """Make the images of T2I-CompBench, in the folder that its own evaluators read.

    RUN/images/ARM/samples has PROMPT_000000.png. Nothing is evaluated here.

    Example: latentguard evaluate t2i-compbench color_val.txt --run runs/color --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0
    """
    from latentguard.evaluate.t2i_compbench import asked_of, read_prompts, report

    lines, sha256 = read_prompts(prompts)
    lines = lines[:limit]
    asked = asked_of(lines, images, seed)
    taken = {"sha256": sha256, "prompts": len(lines), "limit": limit, "seed": seed}
    folder = given.folder("t2i-compbench", taken, asked)
    given.make(folder, asked)
    given.show(report(folder, asked, given.names))
