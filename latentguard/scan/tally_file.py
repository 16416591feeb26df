"""A tally as a file."""

from __future__ import annotations

import json
from pathlib import Path

from latentguard.atomic import replacing
from latentguard.scan.tally import Tally


def write_tally(path: str | Path, tally: Tally) -> None:
    """Write a tally as JSON in ASCII, whole or not at all. Raises OSError."""
    text = json.dumps(tally.to_dict(), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    with replacing(path) as file:
        file.write(text.encode("ascii") + b"\n")
