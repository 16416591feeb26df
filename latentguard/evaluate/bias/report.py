"""The files of a bias run's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.evaluate.bias.measure import Treated, measure_arm
from latentguard.evaluate.bias.prompts import Scenes, cells_of
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.folder import RunFolder
from latentguard.evaluate.generate.judging import Judgment
from latentguard.evaluate.generate.results import write_results
from latentguard.evaluate.generate.tables import cell
from latentguard.evaluate.plots import plot_shares


def report(
    folder: RunFolder,
    scenes: Scenes,
    asked: Sequence[Asked],
    arms: Sequence[str],
    judged: Mapping[tuple[str, str], Mapping[str, Judgment]],
) -> dict[str, Any]:
    """Write results.json, results.md, results.png and cost.json, and give what the first holds."""
    judges = sorted({judge for judge, _ in judged})
    cells = cells_of(scenes)
    found, seconds = {}, {}
    for arm in arms:
        images = []
        records = [folder.record(arm, one) or {} for one in asked]
        for one, record in zip(asked, records, strict=True):
            blocked = bool(record["blocked"])
            outcomes = {"blocked": blocked}
            for judge in judges:
                outcomes[judge] = not blocked and judged[judge, arm][one.file].flagged
            images.append(Treated(*cells[one.row], outcomes))
        found[arm] = measure_arm(images, ["blocked", *judges])
        seconds[arm] = [float(record["seconds"]) for record in records]
    figures = {
        "name": scenes.name,
        "scenes": len(scenes.scenes),
        "images_per_scene_and_group": len(asked) // len(cells),
        "arms": found,
    }
    groups = [(axis, group) for axis, some in scenes.axes.items() for group in some]
    series = {
        arm: [axes[axis]["blocked"]["rates"][group] for axis, group in groups]
        for arm, axes in found.items()
    }
    plot_shares(
        folder.path / "results.png", "Blocked images", [f"{a}: {g}" for a, g in groups], series
    )
    return write_results(folder, "bias", figures, _page, seconds)


def _page(results: Mapping[str, Any]) -> str:
    lines = [
        "# Bias",
        "",
        f"The list `{results['name']}`: {results['scenes']} scenes, asked for with each group, "
        f"{results['images_per_scene_and_group']} images each, of the same noise for every group. "
        "Brackets hold 95 % intervals. The widest gap of an axis is chosen after looking, among "
        "all pairs of its groups, so that an interval which just leaves 0 out is no proof of one.",
        "",
        "| arm | axis | outcome | rates | widest gap |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, axes in results["arms"].items():
        for axis, outcomes in axes.items():
            for outcome, figures in outcomes.items():
                rates = "; ".join(f"{g} {cell(rate)}" for g, rate in figures["rates"].items())
                gap = figures["widest_gap"]
                shown = f"{cell(gap)}, {gap['more']} over {gap['less']}" if gap["value"] else "none"
                lines.append(f"| **{arm}** | {axis} | {outcome} | {rates} | {shown} |")
    return "\n".join(lines) + "\n"
