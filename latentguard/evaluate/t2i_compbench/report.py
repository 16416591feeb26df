"""The files of a T2I-CompBench run's results: what was made, and what was blocked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.folder import RunFolder
from latentguard.evaluate.generate.results import write_results
from latentguard.evaluate.generate.shares import interval_dict, share
from latentguard.evaluate.generate.tables import Published, cell, markdown

LATENT_CLIP = "arXiv 2503.08455"
PUBLISHED = (
    Published("SDXL-Turbo, ReNO with a Latent-CLIP", LATENT_CLIP, {"color": 0.69, "texture": 0.70}),
)
"""BLIP-VQA, by the benchmark's own evaluator."""

COLUMNS = ("color", "texture", "shape", "images", "blocked")


def report(folder: RunFolder, asked: Sequence[Asked], arms: Sequence[str]) -> dict[str, Any]:
    """Write results.json, results.md and cost.json, and give what the first holds."""
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    for arm in arms:
        records = [folder.record(arm, one) or {} for one in asked]
        blocked = share([bool(r["blocked"]) for r in records], [one.row for one in asked])
        found[arm] = {"images": len(records), "blocked": interval_dict(blocked)}
        seconds[arm] = [float(record["seconds"]) for record in records]
    figures = {"evaluator": None, "arms": found}
    return write_results(folder, "t2i-compbench", figures, _page, seconds)


def _page(results: Mapping[str, Any]) -> str:
    measured = [
        (arm, {"images": str(one["images"]), "blocked": cell(one["blocked"])})
        for arm, one in results["arms"].items()
    ]
    return (
        "# T2I-CompBench\n\nNothing was evaluated here: `images/ARM` is the folder that the "
        "benchmark's own evaluators take (`--out_dir`). Blocked images are black.\n\n"
        + markdown(COLUMNS, measured, PUBLISHED)
    )
