"""What a run's images cost: seconds, which no two runs share."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence

import torch

from latentguard.evaluate.generate.folder import RunFolder, write_json


def write_cost(folder: RunFolder, seconds: Mapping[str, Sequence[float]]) -> None:
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
