"""Verdicts that are the same, and Python processes in which torch cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from latentguard.judge import Verdict

ROOT = Path(__file__).resolve().parents[2]

# None in sys.modules makes every import of the name an ImportError.
BLOCKED = "import sys; sys.modules.update(torch=None, safetensors=None, onnx=None)\n"

# Sums run in another order: measured worst 4.8e-7 on these latents, the export's own limit is 1e-4.
MARGIN = 1e-5


def same(found: list[Verdict], expected: list[Verdict]) -> None:
    """Equal but for the last digits of scores."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.decision, one.error, one.model) == (other.decision, other.error, other.model)
        assert [c.id for c in one.matched] == [c.id for c in other.matched]
        for a, b in zip(one.concepts, other.concepts, strict=True):
            assert (a.id, a.prompt, a.covered, a.threshold) == (
                b.id,
                b.prompt,
                b.covered,
                b.threshold,
            )
            assert a.margin == pytest.approx(b.margin, abs=MARGIN)


def run_without_torch(
    code: str, *arguments: object, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, in which torch is not there."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        check=False,
    )


def command_without_torch(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """`latentguard ARGUMENTS`, without torch."""
    code = "sys.argv[0] = 'latentguard'\nfrom latentguard.cli import main; main()"
    return run_without_torch(code, *arguments)
