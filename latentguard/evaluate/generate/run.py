"""The loop of a run: every arm makes every image that is not there yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from latentguard import __version__
from latentguard.evaluate.generate.arms import Arm
from latentguard.evaluate.generate.asked import Asked, digest
from latentguard.evaluate.generate.folder import RunFolder
from latentguard.evaluate.generate.generators import Generator


def manifest_of(
    benchmark: str, prompts: Mapping[str, Any], asked: Sequence[Asked], generator: Generator
) -> dict[str, Any]:
    """What a run is of: it goes on only with the same.

    prompts: the benchmark's file by digest, and what was taken of it.
    """
    import diffusers

    return {
        "benchmark": benchmark,
        "prompts": dict(prompts),
        "images": len(asked),
        "images_sha256": digest(asked),
        "generator": generator.describe(),
        "versions": {
            "latentguard": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def make_images(
    folder: RunFolder,
    arms: Sequence[Arm],
    asked: Sequence[Asked],
    progress: Callable[[int, int], None] = lambda done, total: None,
    in_turn: bool = False,
) -> None:
    """Make the images that a run's folder does not have yet.

    in_turn: every arm makes an image before any makes the next, so that what slows a machine down
        for a while does so for all of them. Else one arm after the other.
    progress: called with the images that are there and their number, over all arms.
    Raises UsageError where the run has an arm with another policy or model.
    """
    for arm in arms:
        folder.begin_arm(arm.describe())
    pairs = [(arm, one) for arm in arms for one in asked]
    if in_turn:
        pairs = [(arm, one) for one in asked for arm in arms]
    for done, (arm, one) in enumerate(pairs, 1):
        if folder.record(arm.name, one) is None:
            wait_for_gpu()
            began = time.perf_counter()
            made = arm.make(one)
            wait_for_gpu()
            folder.keep(arm.name, one, made, time.perf_counter() - began)
        progress(done, len(pairs))


def wait_for_gpu() -> None:
    """What a GPU was given is done before a clock is read; nothing without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
