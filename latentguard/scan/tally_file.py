"""A tally as a file."""

from __future__ import annotations

import json
from pathlib import Path

from latentguard.atomic import replacing
from latentguard.scan.tally import Tally


def write_tally(path: str | Path, tally: Tally) -> None:
    """Write a tally, whole or not at all. Raises OSError."""
    with replacing(path) as file:
        file.write(tally_bytes(tally))


def tally_bytes(tally: Tally) -> bytes:
    """A tally as JSON in ASCII, on one line."""
    text = json.dumps(tally.to_dict(), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.encode("ascii") + b"\n"
