"""The files of a GenEval run's results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.atomic import replacing
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.folder import RunFolder
from latentguard.evaluate.generate.judging import Judgment
from latentguard.evaluate.generate.results import write_results
from latentguard.evaluate.generate.tables import Published, cell, markdown
from latentguard.evaluate.geneval.measure import Seen, measure_arm
from latentguard.evaluate.geneval.prompts import TAGS, Prompt
from latentguard.evaluate.plots import plot_shares

GENEVAL = "arXiv 2310.11513"
LATENT_CLIP = "arXiv 2503.08455"
COLUMNS = ("overall", *TAGS, "blocked")


def _figures(overall: float, *by_tag: float) -> dict[str, float]:
    return {"overall": overall, **dict(zip(TAGS, by_tag, strict=False))}


PUBLISHED = (
    Published("Stable Diffusion 1.5", GENEVAL, _figures(0.43, 0.97, 0.38, 0.35, 0.76, 0.04, 0.06)),
    Published("Stable Diffusion 2.1", GENEVAL, _figures(0.50, 0.98, 0.51, 0.44, 0.85, 0.07, 0.17)),
    Published("Stable Diffusion XL", GENEVAL, _figures(0.55, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23)),
    Published("SDXL-Turbo", LATENT_CLIP, _figures(0.54)),
    Published("SDXL-Turbo, ReNO with Latent-CLIP, lower of two models", LATENT_CLIP, _figures(0.6)),
    Published(
        "SDXL-Turbo, ReNO with Latent-CLIP, higher of two models", LATENT_CLIP, _figures(0.62)
    ),
)
"""By the official evaluator, over the whole benchmark."""


def report(
    folder: RunFolder,
    prompts: Sequence[Prompt],
    asked: Sequence[Asked],
    arms: Sequence[str],
    said: Mapping[str, Mapping[str, Judgment]],
) -> dict[str, Any]:
    """Write results.json, results.md, results.png and cost.json, and give what the first holds.

    said: by arm, what the built-in evaluator said of each picture; empty where it was not asked.
    Beside them evaluated/ARM.jsonl has a line for each image with the keys of the official
    evaluator's, from which GenEval's own summary can be made.
    """
    found = {}
    records = {arm: [folder.record(arm, one) or {} for one in asked] for arm in arms}
    for arm in arms:
        images = []
        for one, record in zip(asked, records[arm], strict=True):
            blocked = bool(record["blocked"])
            judgment = said[arm].get(one.file) if arm in said else None
            correct = None if arm not in said else judgment is not None and not judgment.flagged
            images.append(Seen(one.row, blocked, correct))
        found[arm] = measure_arm(prompts, images)
        if arm in said:
            _write_lines(folder, arm, prompts, asked, said[arm])
    figures = {
        "prompts": len(prompts),
        "images_per_prompt": len(asked) // len(prompts),
        "evaluator": "built-in, not the official one" if said else None,
        "arms": found,
    }
    series = {
        arm: [figures["overall"], *(figures["by_tag"].get(tag) for tag in TAGS)]
        for arm, figures in found.items()
    }
    plot_shares(folder.path / "results.png", "Right images", ("overall", *TAGS), series)
    seconds = {arm: [float(r["seconds"]) for r in some] for arm, some in records.items()}
    return write_results(folder, "geneval", figures, _page, seconds)


def _write_lines(
    folder: RunFolder,
    arm: str,
    prompts: Sequence[Prompt],
    asked: Sequence[Asked],
    said: Mapping[str, Judgment],
) -> None:
    target = folder.path / "evaluated" / f"{arm}.jsonl"
    target.parent.mkdir(exist_ok=True)
    with replacing(target) as file:
        for one in asked:
            judgment, prompt = said.get(one.file), prompts[one.row]
            line = {
                "filename": folder.picture(arm, one).relative_to(folder.path).as_posix(),
                "tag": prompt.tag,
                "prompt": prompt.text,
                "correct": judgment is not None and not judgment.flagged,
                "reason": "blocked" if judgment is None else judgment.why,
                "metadata": prompt.line,
            }
            file.write((json.dumps(line) + "\n").encode())


def _page(results: Mapping[str, Any]) -> str:
    measured = []
    for arm, figures in results["arms"].items():
        cells = {"overall": cell(figures["overall"]), "blocked": cell(figures["blocked"])}
        cells |= {tag: cell(figures["by_tag"].get(tag)) for tag in TAGS}
        measured.append((arm, cells))
    evaluator = (
        "Right or wrong is said by the built-in evaluator (torchvision's Mask R-CNN, colors by "
        "their pixels). It is not the official one, so these rows compare with one another and "
        "not with the published ones."
        if results["evaluator"]
        else "Nothing was evaluated here: `images/ARM` has the layout that GenEval's own "
        "evaluator reads."
    )
    return (
        "# GenEval\n\n"
        f"The share of right images. {results['prompts']} prompts, "
        f"{results['images_per_prompt']} images each. {evaluator} Overall is the mean over the "
        "tags. A blocked image is not right. Brackets hold 95 % intervals.\n\n"
        + markdown(COLUMNS, measured, PUBLISHED)
    )
