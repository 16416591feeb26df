"""`latentguard evaluate reno`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.evaluate import evaluate_app
from latentguard.cli.generating import Generation, generating


def register(app: typer.Typer) -> None:
    """Add the command to those of `evaluate`."""
    evaluate_app.command("reno", no_args_is_help=True)(reno_)


@generating(arm="reno")
def reno_(
    given: Generation,
    prompts: Annotated[
        Path,
        typer.Argument(
            help="A text file with one prompt per line, such as those of T2I-CompBench, or "
            "GenEval's evaluation_metadata.jsonl."
        ),
    ],
    images: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of images to generate for each prompt.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image of each prompt.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many prompts, from the first.")
    ] = None,
) -> None:
    """Measure how much a noise search raises the similarity with the prompt, and what it costs.

    Each --reward is an arm of its own. The arms take turns, so one run compares the seconds that
    rewards on latents and on pixels take.

    Example: latentguard evaluate reno prompts.txt --run runs/reno --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0 --reward latent:latent-clip-b4-plus
    --reward pixel:ViT-B-32:laion2b_s34b_b79k
    """
    from latentguard.errors import UsageError
    from latentguard.evaluate.reno import asked_of, read_prompts, report

    if list(dict.fromkeys(given.arm)) != ["reno"]:
        raise UsageError(
            "evaluate reno has only the arm reno; geneval, t2i-compbench and i2p compare it with "
            "other arms"
        )
    lines, sha256 = read_prompts(prompts)
    lines = lines[:limit]
    asked = asked_of(lines, images, seed)
    taken = {"sha256": sha256, "prompts": len(lines), "limit": limit, "seed": seed}
    folder = given.folder("reno", taken, asked)
    given.make(folder, asked, in_turn=True)
    rewards = dict(zip(given.names, dict.fromkeys(given.reward), strict=True))
    given.show(report(folder, asked, rewards))
