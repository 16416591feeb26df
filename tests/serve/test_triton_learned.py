"""Triton's decision model with concepts that were learned from examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from serve_helpers import run_ensemble

from latentguard.export import Exported, export_triton
from latentguard.runtime import Guard, Verdict


def test_triton_says_what_the_runtime_says(
    learned_export: Exported, latents: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    repository = tmp_path / "model_repository"
    export_triton(learned_export.path, repository)
    answer = run_ensemble(repository, "latentguard", {"latents": latents})
    with Guard(learned_export.path) as guard:
        expected = guard.scan(latents)
    verdicts = [Verdict.from_dict(json.loads(text)) for (text,) in answer["verdict"]]
    assert verdicts == expected
    reasons = [verdict.reason for verdict in verdicts if verdict.decision == "block"]
    assert reasons
    assert all("matched 'examples of handguns'" in reason for reason in reasons)
