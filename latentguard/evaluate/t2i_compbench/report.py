"""The files of a T2I-CompBench run's results: what was made, what was blocked, and the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.folder import RunFolder
from latentguard.evaluate.generate.judging import Judgment
from latentguard.evaluate.generate.results import write_results
from latentguard.evaluate.generate.shares import interval_dict, mean, share
from latentguard.evaluate.generate.tables import Published, cell, markdown

LATENT_CLIP = "arXiv 2503.08455"
PUBLISHED = (
    Published("SDXL-Turbo, ReNO with a Latent-CLIP", LATENT_CLIP, {"color": 0.69, "texture": 0.70}),
)
"""BLIP-VQA, by the benchmark's own evaluator."""

KINDS = ("color", "texture", "shape")
"""The benchmark's files that BLIP-VQA is for, by the beginnings of their names."""
COLUMNS = (*KINDS, "BLIP-VQA", "images", "blocked")


@dataclass(frozen=True)
class Scored:
    """What the built-in evaluator was asked, and said.

    phrases: how they were found. asked: the images of prompts that have phrases. said: by arm and
    image; a blocked one has no line.
    """

    phrases: str
    asked: Sequence[Asked]
    said: Mapping[str, Mapping[str, Judgment]]


def report(
    folder: RunFolder,
    asked: Sequence[Asked],
    arms: Sequence[str],
    file: str = "",
    scored: Scored | None = None,
) -> dict[str, Any]:
    """Write results.json, results.md and cost.json, and give what the first holds.

    file: the name of the prompts' file. scored: None where nothing was evaluated.
    """
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    for arm in arms:
        records = [folder.record(arm, one) or {} for one in asked]
        blocked = share([bool(r["blocked"]) for r in records], [one.row for one in asked])
        found[arm] = {"images": len(records), "blocked": interval_dict(blocked)}
        if scored is not None:
            found[arm]["blip_vqa"] = _score(scored, arm)
        seconds[arm] = [float(record["seconds"]) for record in records]
    figures: dict[str, Any] = {"evaluator": None, "arms": found}
    if scored is not None:
        figures = {
            "evaluator": "built-in, not the official one",
            "kind": next((kind for kind in KINDS if file.startswith(kind)), None),
            "phrases": scored.phrases,
            "prompts": len({one.row for one in asked}),
            "prompts_evaluated": len({one.row for one in scored.asked}),
            "arms": found,
        }
    return write_results(folder, "t2i-compbench", figures, _page, seconds)


def _score(scored: Scored, arm: str) -> dict[str, Any]:
    """The mean over images; a blocked image shows nothing of what was asked for: 0."""
    said = scored.said[arm]
    values = [said[one.file].score if one.file in said else 0.0 for one in scored.asked]
    found = mean(values, [one.row for one in scored.asked])
    return {**interval_dict(found), "images": len(values)}


def _page(results: Mapping[str, Any]) -> str:
    column = results.get("kind") or "BLIP-VQA"
    measured = [
        (
            arm,
            {
                column: cell(one.get("blip_vqa")),
                "images": str(one["images"]),
                "blocked": cell(one["blocked"]),
            },
        )
        for arm, one in results["arms"].items()
    ]
    return f"# T2I-CompBench\n\n{_told(results)}\n\n" + markdown(COLUMNS, measured, PUBLISHED)


def _told(results: Mapping[str, Any]) -> str:
    if results["evaluator"] is None:
        return (
            "Nothing was evaluated here: `images/ARM` is the folder that the benchmark's own "
            "evaluators take (`--out_dir`). Blocked images are black."
        )
    return (
        "BLIP-VQA by the built-in evaluator, which is not the official one: these rows compare "
        f"with one another first. Phrases are {results['phrases']}. "
        f"{results['prompts_evaluated']} of {results['prompts']} prompts were evaluated. A blocked "
        "image counts as 0. Brackets hold 95 % intervals, by drawing prompts."
    )
