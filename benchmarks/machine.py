"""Where a benchmark ran, for its results."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict[str, str | int | None]:
    """The processor's name, its cores, and torch's version, None where it is not installed."""
    try:
        torch: str | None = version("torch")
    except PackageNotFoundError:
        torch = None
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    return {"cpu": name, "cores": os.cpu_count(), "torch": torch}
