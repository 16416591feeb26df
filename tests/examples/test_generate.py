"""The guarded generation of the examples, run as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="generating needs diffusers")
pytest.importorskip("matplotlib", reason="the plot needs matplotlib")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "generate.py"


@pytest.mark.slow
def test_what_is_forbidden_does_not_come_out(tmp_path):
    plot = tmp_path / "guard.png"
    command = [sys.executable, str(SCRIPT), "cat", "revolver", "--steps", "4", "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    cat = next(row for row in rows if row[:1] == ["cat"])
    revolver = next(row for row in rows if row[:1] == ["revolver"])
    assert cat[1] == "allow"
    assert cat[-1] == "cat"
    assert revolver[1] == "block"
    assert revolver[-1] == "nothing"
    assert plot.stat().st_size > 10_000
