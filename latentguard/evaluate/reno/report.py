"""The files of a ReNO run: what the search gained, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.atomic import replacing
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.folder import RunFolder, read_json, write_json
from latentguard.evaluate.generate.results import write_results
from latentguard.evaluate.generate.tables import Published, cell, markdown
from latentguard.evaluate.plots import plot_curves
from latentguard.evaluate.reno.measure import Record, cost_of, measure_arm, saved, seconds_of

LATENT_CLIP = "arXiv 2503.08455"
PUBLISHED = (
    Published("SDXL-Turbo, CLIP on pixels, 50 iterations", LATENT_CLIP, {"seconds": 11.59}),
    Published("SDXL-Turbo, a Latent-CLIP, 50 iterations", LATENT_CLIP, {"seconds": 9.11}),
    Published("SDXL-Turbo, the other Latent-CLIP, 50 iterations", LATENT_CLIP, {"seconds": 9.01}),
)
"""Seconds a prompt on the paper's GPU."""

COLUMNS = ("seconds", "search", "iteration", "GPU memory, GB")


def report(folder: RunFolder, asked: Sequence[Asked], arms: Mapping[str, str]) -> dict[str, Any]:
    """Write results.json, results.md, results.png, cost.json and cost.md; give the first.

    arms: the reward of each arm, by the arm's name. Seconds stand in cost.json and cost.md alone.
    """
    records = {arm: [folder.record(arm, one) or {} for one in asked] for arm in arms}
    found = {arm: measure_arm(records[arm], reward) for arm, reward in arms.items()}
    figures = {"prompts": len({one.row for one in asked}), "arms": found}
    seconds = {arm: [seconds_of(one) for one in some] for arm, some in records.items()}
    results = write_results(folder, "reno", figures, _page, seconds)
    curves = {arm: one["curve"] for arm, one in found.items()}
    title = "Best similarity with the prompt so far, by the reward's own model"
    plot_curves(folder.path / "results.png", title, "cosine", curves)
    _write_cost(folder, records, arms)
    return results


def _write_cost(
    folder: RunFolder, records: Mapping[str, Sequence[Record]], arms: Mapping[str, str]
) -> None:
    """What the search costs by arm, and what rewards on latents save against those on pixels."""
    cost = read_json(folder.path / "cost.json")
    for arm, some in records.items():
        cost["arms"][arm] |= cost_of(some)
    cost["saved"] = {
        f"{arm} against {other}": saved(records[arm], records[other])
        for arm, reward in arms.items()
        for other, against in arms.items()
        if reward.startswith("latent:") and against.startswith("pixel:")
    }
    write_json(folder.path / "cost.json", cost)
    with replacing(folder.path / "cost.md") as file:
        file.write(_cost_page(cost).encode())


def _page(results: Mapping[str, Any]) -> str:
    lines = [
        "# ReNO: similarity with the prompt",
        "",
        f"Cosines of image and prompt, means over images. {results['prompts']} prompts. Each row "
        "is an arm, whose reward searched the noise, and a model that measured its images: of the "
        "noise as drawn, and of the best that was found. A model that was not the reward tells "
        "whether the search fooled its own. Brackets hold 95 % bootstrap intervals over prompts. "
        "Cosines of two models do not compare.",
        "",
        "| arm | measured by | before | after | gained |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, figures in results["arms"].items():
        for name, by in figures["measured"].items():
            shown = f"{name} (its reward)" if name == figures["reward"] else name
            cells = " | ".join(cell(by[key]) for key in ("before", "after", "gained"))
            lines.append(f"| {arm} | {shown} | {cells} |")
    lines += ["", "`results.png` has the curves over iterations, `cost.md` the seconds."]
    return "\n".join(lines) + "\n"


def _cost_page(cost: Mapping[str, Any]) -> str:
    measured = []
    for arm, one in cost["arms"].items():
        cells = {
            "seconds": f"{one['seconds_median']:.2f}",
            "search": f"{one['search_seconds_median']:.2f}",
            "iteration": f"{one['iteration_seconds_median']:.3f}",
        }
        if one["peak_bytes"] is not None:
            cells["GPU memory, GB"] = f"{one['peak_bytes'] / 1e9:.1f}"
        measured.append((arm, cells))
    machine = cost["machine"]
    page = (
        "# ReNO: what a prompt costs\n\n"
        f"Medians over images, in seconds, on {machine['gpu'] or machine['cpu']}: the search with "
        "the picture of what it found, the search alone, and one iteration of it. The arms took "
        "turns on each image.\n\n" + markdown(COLUMNS, measured, PUBLISHED)
    )
    if cost["saved"]:
        page += "\n| reward on latents against reward on pixels | share of seconds saved |\n"
        page += "| --- | --- |\n"
        page += "".join(f"| {pair} | {cell(one)} |\n" for pair, one in cost["saved"].items())
        page += "| published | 0.21 |\n"
    return page
