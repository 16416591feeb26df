"""Teaching a concept from drawings, run as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="generating needs diffusers")
pytest.importorskip("matplotlib", reason="the plot needs matplotlib")

from latentguard.policy import load_policy
from latentguard.policy.examples import load_concept
from latentguard.runtime import Guard

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "teach.py"


@pytest.mark.slow
def test_what_was_taught_is_guarded_and_exported(tmp_path: Path) -> None:
    out = tmp_path / "teach"
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for asked in ("cigarette-001", "cigarette-002"):
        assert [asked, "block"] in [row[:2] for row in rows]
    for asked in ("ball-002", "pencil-000"):
        assert [asked, "allow"] in [row[:2] for row in rows]
    (entry,) = load_concept(out / "cigarette.safetensors").entries
    assert (entry.model, entry.space, entry.positives) == ("nano-sdxl", "sdxl", 50)
    with Guard(out / "no-smoking.onnx") as guard:
        about = guard.metadata["policy"]
        assert about["sha256"] == load_policy(out / "no-smoking.yaml").sha256
        assert "latents" not in json.dumps(about["concepts"])
    assert (out / "guard.png").stat().st_size > 10_000
