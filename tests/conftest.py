"""Fixtures of more than one room."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from latentguard import cli

if TYPE_CHECKING:
    from latentguard.export import Exported


# Before torch is imported: one thread a process, as several processes share the cores. What the
# tests start has it, too. A thread that waits must not take the time of one that works.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass
class Ran:
    """What a run of the command gave."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Each test draws the same random numbers, whichever tests ran before it in this process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def own_spaces() -> Iterator[None]:
    """Latent spaces that a test makes known are forgotten after it: files are told apart by all
    that are."""
    spaces = sys.modules.get("latentguard.spaces.space")
    before = set(spaces.SPACES) if spaces else set()
    yield
    spaces = sys.modules.get("latentguard.spaces.space")
    for name in set(spaces.SPACES) - before - set(spaces.RECORDS) if spaces else ():
        del spaces.SPACES[name]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs `latentguard ARGUMENTS` through its entry point, in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["latentguard", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same one in all processes of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def traced_once(shared_folder: Path) -> Iterator[None]:
    """See `exported.tracing_once`; the rooms that export share what was traced."""
    for package in ("torch", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"exporting a model needs {package}")
    from exported import tracing_once

    with tracing_once(shared_folder):
        yield


@pytest.fixture(scope="session")
def cascade(traced_once: None, shared_folder: Path) -> Exported:
    """nano-flux2 first, then a small Latent-CLIP with random weights, as two files."""
    from exported import exported_once, second, two_stages

    from latentguard.export import export_onnx

    def make(out: Path) -> Exported:
        return export_onnx(two_stages(), second(), out, size=(32, 32))

    return exported_once(shared_folder, "cascade", make)


@pytest.fixture(scope="session")
def learned_export(traced_once: None, shared_folder: Path) -> Exported:
    """nano-flux2 under a policy with concepts that were learned from examples (learned.py), which
    lies beside the file as house.yaml."""
    from exported import exported_once
    from learned import NANO, photos, write_policy

    from latentguard.export import export_onnx

    def make(out: Path) -> Exported:
        policy = write_policy(out.parent)
        few = photos()[:4]
        return export_onnx(policy, NANO, out, size=(32, 32), heatmaps=True, check=few)

    return exported_once(shared_folder, "learned", make)
