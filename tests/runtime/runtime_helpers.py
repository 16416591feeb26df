"""Python processes in which torch cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# None in sys.modules makes every import of the name an ImportError.
BLOCKED = "import sys; sys.modules.update(torch=None, safetensors=None, onnx=None)\n"


def run_without_torch(
    code: str, *arguments: object, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, in which torch is not there."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        check=False,
    )


def command_without_torch(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """`latentguard ARGUMENTS`, without torch."""
    code = "sys.argv[0] = 'latentguard'\nfrom latentguard.cli import main; main()"
    return run_without_torch(code, *arguments)
