"""`latentguard evaluate t2i-compbench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latentguard.cli.evaluate import evaluate_app
from latentguard.cli.generating import Generation, generating

if TYPE_CHECKING:
    from latentguard.evaluate.t2i_compbench.blip import BlipVqa


def register(app: typer.Typer) -> None:
    """Add the command to those of `evaluate`."""
    evaluate_app.command("t2i-compbench", no_args_is_help=True)(t2i_compbench_)


@generating()
def t2i_compbench_(
    given: Generation,
    prompts: Annotated[Path, typer.Argument(help="One of the benchmark's prompt files.")],
    evaluator: Annotated[
        Literal["none", "blip-vqa"],
        typer.Option(
            help="none: only make the images, in the layout that the official evaluators read. "
            "blip-vqa: also score color, texture and shape with a built-in BLIP-VQA, which is not "
            "the official evaluator."
        ),
    ] = "none",
    blip: Annotated[
        str | None,
        typer.Option(
            help="For blip-vqa: a folder with the transformers model, or its name on the hub, "
            "which downloads it."
        ),
    ] = None,
    phrases: Annotated[
        Path | None,
        typer.Option(
            help="For blip-vqa: a file of prompts and their noun phrases, separated by tabs. "
            "Without it only plain prompts are scored."
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of images to generate for each prompt.")
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image of each prompt.")] = 42,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many prompts, from the first.")
    ] = None,
) -> None:
    """Make the images of T2I-CompBench in the layout that its own evaluators read.

    RUN/images/ARM/samples has PROMPT_000000.png. --evaluator blip-vqa scores them as well.

    Example: latentguard evaluate t2i-compbench color_val.txt --run runs/color --pipeline
    stabilityai/sdxl-turbo --steps 1 --guidance 0 --evaluator blip-vqa
    --blip Salesforce/blip-vqa-capfilt-large
    """
    from latentguard.evaluate.t2i_compbench import Scored, asked_of, read_prompts, report

    lines, sha256 = read_prompts(prompts)
    lines = lines[:limit]
    found = _phrases(evaluator, blip, phrases, lines)
    judge = None if found is None else _judge(str(blip), found, given.where)
    asked = asked_of(lines, images, seed)
    taken = {"sha256": sha256, "prompts": len(lines), "limit": limit, "seed": seed}
    folder = given.folder("t2i-compbench", taken, asked)
    given.make(folder, asked)
    scored = None
    if judge is not None and found is not None:
        those = [one for one in asked if one.prompt in found]
        judged = given.judge(folder, [judge], those)
        how = "found by splitting plain prompts" if phrases is None else f"those of {phrases.name}"
        scored = Scored(how, those, {name: judged[judge.name, name] for name in given.names})
    given.show(report(folder, asked, given.names, prompts.name, scored))


def _phrases(
    evaluator: str, blip: str | None, file: Path | None, prompts: list[str]
) -> dict[str, tuple[str, ...]] | None:
    """The phrases to ask about for each prompt; None if nothing is evaluated.

    Raises UsageError for options that do not go together, and if no prompt has phrases.
    """
    from latentguard.errors import UsageError
    from latentguard.evaluate.t2i_compbench.phrases import phrases_of_all, read_phrases

    if evaluator == "none":
        if blip is not None or file is not None:
            raise UsageError("--blip and --phrases need --evaluator blip-vqa")
        return None
    if blip is None:
        raise UsageError(
            "--evaluator blip-vqa needs --blip: a folder that transformers wrote, or "
            "Salesforce/blip-vqa-capfilt-large, which is downloaded"
        )
    found = phrases_of_all(prompts) if file is None else read_phrases(file, prompts)
    if not found:
        raise UsageError(
            "no prompt is a list of things joined by 'and', so no phrases can be found: give "
            "--phrases"
        )
    return found


def _judge(blip: str, phrases: dict[str, tuple[str, ...]], device: str) -> BlipVqa:
    from latentguard.evaluate.t2i_compbench.blip import BlipVqa

    return BlipVqa(blip, phrases, device)
