"""The files of a run's results, whatever it measured."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from latentguard.atomic import replacing
from latentguard.evaluate.generate.folder import RunFolder, write_json


def write_results(
    folder: RunFolder,
    benchmark: str,
    figures: Mapping[str, Any],
    page: Callable[[Mapping[str, Any]], str],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Write results.json, results.md and cost.json, and give what the first holds.

    figures: what was measured. page: the Markdown of what results.json holds. seconds: by arm, of
    each image; they stand in cost.json alone, as no two runs share them.
    """
    results = {
        "schema_version": 1,
        "benchmark": benchmark,
        "manifest_sha256": folder.sha256,
        **figures,
    }
    write_json(folder.path / "results.json", results)
    with replacing(folder.path / "results.md") as file:
        file.write(page(results).encode())
    _write_cost(folder, seconds)
    return results


def _write_cost(folder: RunFolder, seconds: Mapping[str, Sequence[float]]) -> None:
    """Write cost.json: seconds an image by arm, and the machine that they are of.

    seconds: by arm, of each image. The median leaves out what the first image waits for.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"gpu": gpu, "cpu": platform.machine(), "threads": torch.get_num_threads()}
    arms = {
        arm: {
            "images": len(values),
            "seconds_median": round(statistics.median(values), 4),
            "seconds_mean": round(statistics.fmean(values), 4),
        }
        for arm, values in seconds.items()
    }
    write_json(folder.path / "cost.json", {"machine": machine, "arms": arms})
