"""Guarded pipelines that let no image out, for tests that try to get one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import guard_pipelines as small
import torch
from guard_helpers import ALWAYS, LinearEncoder, policy

from latentguard import LatentGuard

XL = LinearEncoder("sdxl", 4)
FINAL_ONLY = "noise_window: [0, 0]"
"""Of a concept: nothing matches before the end, so that all the loop is left to be tricked."""


def blocking(**options: Any) -> LatentGuard:
    """A guard that blocks every image at the first step that it sees."""
    return LatentGuard(policy(ALWAYS), XL, **options)


def blocking_late(**options: Any) -> LatentGuard:
    """A guard that blocks every image, but only once it is finished."""
    return LatentGuard(policy(ALWAYS, concept=FINAL_ONLY), XL, **options)


def guarded(guard: LatentGuard | None = None, make: Callable[[], Any] = small.sdxl) -> Any:
    pipe = make()
    pipe.callback_on_step_end = blocking_late() if guard is None else guard
    return pipe


def latents_of(pipe: Any, **more: Any) -> torch.Tensor:
    return pipe(**small.sdxl_arguments(output_type="latent", **more)).images
