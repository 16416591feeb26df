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
            help="A text file with a prompt a line, T2I-CompBench's too, or GenEval's "
            "evaluation_metadata.jsonl."
        ),
    ],
    images: Annotated[int, typer.Option(min=1, max=1000, help="Of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image of each prompt.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
) -> None:
    """How much a searched noise gains with its prompt, and what rewards on latents save.

    Each --reward is an arm of its own, and they take turns, so that one run compares their seconds.

    Example: latentguard evaluate reno prompts.txt --run runs/reno --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0 --reward latent:latent-clip-b4-plus
    --reward pixel:ViT-B-32:laion2b_s34b_b79k
    """
    from latentguard.errors import UsageError
    from latentguard.evaluate.reno import asked_of, read_prompts, report

    if list(dict.fromkeys(given.arm)) != ["reno"]:
        raise UsageError(
            "evaluate reno has the arm reno alone; geneval, t2i-compbench and i2p compare it with "
            "others"
        )
    lines, sha256 = read_prompts(prompts)
    lines = lines[:limit]
    asked = asked_of(lines, images, seed)
    taken = {"sha256": sha256, "prompts": len(lines), "limit": limit, "seed": seed}
    folder = given.folder("reno", taken, asked)
    given.make(folder, asked, in_turn=True)
    rewards = dict(zip(given.names, dict.fromkeys(given.reward), strict=True))
    given.show(report(folder, asked, rewards))
