"""A guard on a pipeline that every supported version of diffusers has.

`scripts/check_diffusers.sh VERSION` runs this file with another version than the installed one.
"""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from small_pipeline import small_stable_diffusion  # noqa: E402

from latentguard import GuardError, LatentGuard  # noqa: E402
from latentguard.guard import probe  # noqa: E402
from latentguard.policy import Policy  # noqa: E402


def policy(threshold: float, action: str = "block") -> Policy:
    """Everything is over a margin of -1, nothing over 1."""
    return Policy.model_validate(
        {
            "schema_version": 1,
            "name": "test",
            "version": "1",
            "concepts": [
                {
                    "id": "arms",
                    "category": "weapons",
                    "prompts": ["revolver"],
                    "threshold": {"margin": threshold},
                    "action": action,
                }
            ],
        }
    )


def images(pipe: Any, **more: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    said = pipe("a", num_inference_steps=3, generator=generator, output_type="np", **more)
    return np.asarray(said.images)


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = small_stable_diffusion()
    made.set_progress_bar_config(disable=True)
    return made


def test_an_observing_guard_changes_nothing(pipe: Any) -> None:
    expected = images(pipe)
    guard = LatentGuard(policy(1.0), "nano-view")
    pipe.callback_on_step_end = guard
    assert (images(pipe) == expected).all()
    assert guard.verdicts[0].decision == "allow"
    assert guard.verdicts[0].error is None
    pipe.callback_on_step_end = None
    assert (images(pipe) == expected).all()
    assert (images(pipe, callback_on_step_end=guard) == expected).all()


def test_a_blocked_image_is_black(pipe: Any) -> None:
    guard = LatentGuard(policy(-1.0), "nano-view")
    pipe.callback_on_step_end = guard
    try:
        assert (images(pipe) == 0).all()
        assert guard.verdicts[0].decision == "block"
        assert guard.verdicts[0].matched[0].prompt == "revolver"
    finally:
        pipe.callback_on_step_end = None


def test_a_guard_beside_other_callbacks_and_on_a_pipeline_made_from_another(pipe: Any) -> None:
    seen: list[int] = []

    def other(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return kwargs

    guard = LatentGuard(policy(-1.0), "nano-view")
    pipe.callback_on_step_end = guard
    try:
        made = diffusers.StableDiffusionPipeline.from_pipe(pipe)
        made.set_progress_bar_config(disable=True)
        assert (images(made) == 0).all()
        assert (images(pipe, callback_on_step_end=other) == 0).all()
        assert seen
    finally:
        pipe.callback_on_step_end = None


@pytest.mark.parametrize("name", ["progress_bar", "from_pipe", "__setattr__"])
def test_a_version_without_a_place_is_refused(name: str) -> None:
    parts = {key: value for key, value in vars(diffusers.DiffusionPipeline).items() if key != name}
    other = SimpleNamespace(
        __version__="9.9",
        DiffusionPipeline=type("DiffusionPipeline", (), {"progress_bar": None, **_plain(parts)}),
        configuration_utils=diffusers.configuration_utils,
        callbacks=diffusers.callbacks,
        SchedulerMixin=diffusers.SchedulerMixin,
    )
    with pytest.raises(GuardError, match=rf"diffusers 9\.9 has no DiffusionPipeline\.{name}"):
        probe.check_diffusers(other)


def _plain(parts: dict[str, Any]) -> dict[str, Any]:
    wanted = ("progress_bar", "from_pipe", "__setattr__")
    return {name: parts[name] for name in wanted if name in parts}


def test_the_installed_version_has_them_all() -> None:
    probe.check_diffusers(diffusers)
    assert diffusers.__version__ == version("diffusers")
