"""The header of a safetensors file, read without torch: what a file of weights says of itself."""

from __future__ import annotations

import json
from pathlib import Path

from latentguard.errors import ModelError

# The format's own limit for the JSON header.
MAX_HEADER = 100_000_000


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, from its header alone; ModelError if it has none."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= min(MAX_HEADER, path.stat().st_size):
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
        metadata = header["__metadata__"]
        if not isinstance(metadata, dict):
            raise TypeError("metadata that is not a dict")
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path}: not a safetensors file with latentguard's metadata ({first_line(error)})"
        ) from error
    return {str(key): str(value) for key, value in metadata.items()}


def first_line(error: BaseException) -> str:
    """The gist of a library's error: its first line, its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
