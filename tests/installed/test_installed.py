"""An installed package without torch, tried from a folder that knows nothing of its checkout.

`scripts/check_wheel.sh` runs this in an environment of its own; among the other tests it is run
there, too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
LATENTS = next(
    path
    for path in (HERE.parent / "latents.pt", HERE.parents[1] / "examples" / "latents.pt")
    if path.exists()
)
WITHOUT = (
    "import sys, importlib.util as util; sys.modules['torch'] = None; found = util.find_spec\n"
    "util.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
    "from latentguard.cli import main; main()"
)


def latentguard(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, as if there were no torch."""
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_what_the_package_says_of_itself() -> None:
    said = metadata("latentguard")
    assert said["License-Expression"] == "Apache-2.0"
    assert "Programming Language :: Python :: 3.11" in said.get_all("Classifier", [])
    assert "Topic :: Scientific/Engineering :: Artificial Intelligence" in said.get_all(
        "Classifier", []
    )


def test_a_scan_with_a_report(tmp_path: Path) -> None:
    shutil.copy(LATENTS, tmp_path / "latents.pt")
    ran = latentguard(
        *("scan", "latents.pt", "--policy", "family", "--format", "json", "--report", "r.html"),
        *("--heatmap", "--fail-on", "never"),
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    records = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(records) == 25
    by_id = {record["id"]: record["decision"] for record in records}
    assert by_id["revolver"] == "block"
    assert by_id["astronaut"] == "allow"
    assert (tmp_path / "r.html").stat().st_size > 100_000


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["policy", "list"],
        ["policy", "show", "family"],
        ["models", "list"],
        ["spaces", "list"],
        ["doctor"],
        ["scan", "--help"],
    ],
)
def test_what_works_without_torch(arguments: list[str], tmp_path: Path) -> None:
    ran = latentguard(*arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "latents.pt", "--runtime", "torch"],
        ["concept", "learn", "x", "--positives", "latents.pt", "--model", "nano-flux2", "-o", "x"],
        ["export", "onnx", "--model", "nano-flux2", "-o", "x.onnx"],
        ["encode", ".", "--autoencoder", "x", "-o", "y.safetensors"],
        ["calibrate", "latents.pt", "--policy", "family", "--fpr", "0.01"],
        ["evaluate", "zeroshot", "latents.pt", "--names", "x", "--labels", "y"],
    ],
)
def test_what_needs_torch_names_the_extra(arguments: list[str], tmp_path: Path) -> None:
    shutil.copy(LATENTS, tmp_path / "latents.pt")
    ran = latentguard(*arguments, cwd=tmp_path)
    assert ran.returncode == 2, ran.stdout
    assert "pip install" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_guard_in_python() -> None:
    from latentguard.bundled import bundled_guard

    guard = bundled_guard("weapons", "nano-flux2")
    verdict = guard.scan(np.zeros((1, 32, 32, 32), np.float32))[0]
    assert verdict.decision in ("allow", "review", "block")
