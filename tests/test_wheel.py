"""The wheel: built in a clean environment, installed in another, tried from a third folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_and_the_source_distribution(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout with git")
    # Outside of this environment, whose packages must not be seen.
    base = Path(sys.base_prefix, "bin", "python3")
    environment = {**os.environ, "PYTHON": str(base if base.exists() else sys.executable)}
    ran = subprocess.run(
        [ROOT / "scripts" / "check_wheel.sh", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition("-")[2] for name in names] == ["any.whl", "0.1.0.tar.gz"]
    with tarfile.open(tmp_path / names[1]) as source:
        held = {name.partition("/")[2] for name in source.getnames()}
    # What the operators are compiled from.
    kernels = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert kernels <= held
    assert {"constraints.txt", "Makefile", "scripts/check_wheel.sh"} <= held
