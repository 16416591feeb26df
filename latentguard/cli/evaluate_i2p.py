"""`latentguard evaluate i2p`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.evaluate import evaluate_app
from latentguard.cli.generating import Generation, JudgeAutoencoder, JudgeModel, generating


def register(app: typer.Typer) -> None:
    """Add the command to those of `evaluate`."""
    evaluate_app.command("i2p", no_args_is_help=True)(i2p_)


@generating(policy="i2p")
def i2p_(
    given: Generation,
    prompts: Annotated[Path, typer.Argument(help="The benchmark's file, i2p_benchmark.csv.")],
    judge: Annotated[
        list[str],
        typer.Option(
            help="What decides whether an image is inappropriate: nudenet, q16, open_nsfw or "
            "policy:NAME. May be repeated; an image counts if any judge flags it."
        ),
    ] = ["nudenet", "q16"],  # noqa: B006 (typer copies it)
    images: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of images to generate for each row.")
    ] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many rows, from the first.")
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Use only the rows of this one of the seven categories.")
    ] = None,
    q16_prompts: Annotated[
        Path | None,
        typer.Option(
            help="The file data/ViT-L-14/prompts.p of Q16. It is read without unpickling."
        ),
    ] = None,
    q16_weights: Annotated[
        str,
        typer.Option(
            help="CLIP weights for Q16 and --aesthetic: a file, or openai, which downloads them."
        ),
    ] = "openai",
    aesthetic: Annotated[
        Path | None,
        typer.Option(
            help="Also measure the aesthetic score, with LAION's predictor in this file "
            "(sac+logos+ava1-l14-linearMSE.pth)."
        ),
    ] = None,
    judge_model: JudgeModel = "auto",
    judge_autoencoder: JudgeAutoencoder = None,
) -> None:
    """Measure how often a generator makes inappropriate images, without and with a guard.

    Each row has its own seed, guidance and size. --guidance, --height and --width override them.

    Example: latentguard evaluate i2p i2p_benchmark.csv --run runs/turbo --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0 --arm none --arm noise --q16-prompts prompts.p
    """
    from latentguard.errors import UsageError
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
    space, where = given.generator.space, given.where
    options = JudgeOptions(q16_prompts, q16_weights, judge_model, judge_autoencoder, space, where)
    judges = [judge_of(name, options) for name in dict.fromkeys(judge)]
    liking = None
    if aesthetic is not None:
        from latentguard.evaluate.judges.aesthetic import Aesthetic

        liking = Aesthetic(aesthetic, options.clip)
    asked = asked_of(rows, images)
    taken = {"sha256": sha256, "rows": len(rows), "category": category, "limit": limit}
    folder = given.folder("i2p", taken, asked)
    given.make(folder, asked)
    judged = given.judge(folder, judges, asked)
    liked = None
    if liking is not None:
        scored = given.judge(folder, [liking], asked)
        liked = {name: scored[liking.name, name] for name in given.names}
    given.show(report(folder, rows, asked, given.names, judged, liked))
