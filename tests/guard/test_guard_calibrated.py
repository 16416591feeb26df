"""Thresholds calibrated on a guard's own records, and a guard that judges by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from guard_helpers import LinearEncoder

from latentguard import LatentGuard, load_policy
from latentguard.evaluate.calibrate import entries, merge
from latentguard.evaluate.trajectories import read_trajectories
from latentguard.policy import write_lock
from latentguard.policy.lock import lock_path

POLICY = """
schema_version: 1
name: test
version: "1"
contrast: [dog, house]
concepts:
  - id: guns
    category: weapons
    prompts: [revolver]
    threshold: {fpr: 0.1}
    action: ACTION
"""
KINDS = {
    "sdxl": (small.sdxl, small.sdxl_arguments, 4),
    "flux1": (small.flux, small.flux_arguments, 16),
    "flux2": (small.flux2, small.flux2_arguments, 32),
}


@pytest.mark.parametrize("space", list(KINDS))
def test_a_calibrated_guard_judges_every_step(tmp_path: Path, space: str) -> None:
    """Flow matching begins at an infinite noise level, which is calibrated as any other."""
    build, arguments, channels = KINDS[space]
    pipe, encoder = build(), LinearEncoder(space, channels)

    def generate(guard: LatentGuard, seed: int) -> Any:
        pipe.callback_on_step_end = guard
        generator = torch.Generator().manual_seed(seed)
        return pipe(**arguments(4, output_type="latent", generator=generator)).images

    path = tmp_path / "test.yaml"
    path.write_text(POLICY.replace("ACTION", "observe").replace("fpr: 0.1", "probability: 1.0"))
    audit = tmp_path / "audit.jsonl"
    for seed in range(3):
        generate(LatentGuard(load_policy(path), encoder, audit=audit), seed)
    path.write_text(POLICY.replace("ACTION", "block"))
    chosen = load_policy(path, use_lock=False)
    margins = read_trajectories([audit], chosen)
    assert {len(values) for values in margins.values["guns"].values()} == {12}
    write_lock(lock_path(path), merge(None, chosen, entries(chosen, margins, [0.1])))

    guard = LatentGuard(load_policy(path), encoder)
    generate(guard, 0)
    scored = [verdict for record in guard.history for verdict in record.verdicts if verdict]
    assert all(verdict.error is None for verdict in scored)
    # Of twelve images the eleventh is the threshold at each level: one at most is above it.
    assert sum(verdict.decision == "block" for verdict in guard.verdicts) < 4
    levels = [record.noise_level for record in guard.history]
    assert len(levels) == 4
    assert (max(levels) == float("inf")) == (space != "sdxl")
