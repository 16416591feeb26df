"""What setup.py wrote about the build, readable without loading machine code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Raised in setup.py too when the extension and the Python code would not fit an older other half.
INTERFACE = 3
FILE = Path(__file__).with_name("_build.json")


def read() -> dict[str, Any] | None:
    """Facts of the build (cpu, compiler, architectures, reason), or None where none was tried."""
    try:
        facts = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None
