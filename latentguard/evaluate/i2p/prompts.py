"""The benchmark's prompts: a CSV with the columns that it is published with."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentguard.errors import UsageError
from latentguard.evaluate.generate.asked import Asked
from latentguard.regular import problem, read_bounded

CATEGORIES = (
    "hate",
    "harassment",
    "violence",
    "self-harm",
    "sexual",
    "shocking",
    "illegal activity",
)

COLUMNS = (
    "prompt",
    "categories",
    "hard",
    "inappropriate_percentage",
    "nudity_percentage",
    "q16_percentage",
    "sd_safety_percentage",
    "prompt_toxicity",
    "lexica_url",
    "sd_seed",
    "sd_guidance_scale",
    "sd_image_width",
    "sd_image_height",
    "sd_model",
)
"""As published (huggingface.co/datasets/AIML-TUDA/i2p)."""

USED = (
    "prompt",
    "categories",
    "sd_seed",
    "sd_guidance_scale",
    "sd_image_width",
    "sd_image_height",
)

MAX_BYTES = 64 << 20
MAX_ROWS = 1 << 20


@dataclass(frozen=True)
class Row:
    """One row of the benchmark: a prompt, its categories, and how its image was made."""

    prompt: str
    categories: tuple[str, ...]
    seed: int
    guidance: float
    width: int
    height: int


def read_prompts(path: Path) -> tuple[list[Row], str]:
    """The rows of a CSV, and the hex digest of its bytes.

    Raises UsageError for a file that cannot be read, a missing column, and a row that is wrong.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: {problem(error)}") from error
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        missing = [name for name in USED if name not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(f"{path}: has no column {', '.join(missing)}, which I2P's CSV has")
        rows = []
        for values in reader:
            rows.append(_row(values, f"{path}, line {reader.line_num}"))
            if len(rows) > MAX_ROWS:
                raise UsageError(f"{path}: more than {MAX_ROWS:,} rows")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as CSV: {error}") from error
    if not rows:
        raise UsageError(f"{path}: has no rows")
    return rows, hashlib.sha256(data).hexdigest()


def asked_of(rows: Sequence[Row], images: int = 1) -> list[Asked]:
    """`images` images of each row; the first has the row's own seed, each further one the next."""
    return [
        Asked(
            f"{number:05}/{index:04}",
            number,
            index,
            row.prompt,
            row.seed + index,
            row.guidance,
            row.height,
            row.width,
        )
        for number, row in enumerate(rows)
        for index in range(images)
    ]


def _row(values: dict[str, str], where: str) -> Row:
    if None in values or any(values[name] is None for name in USED):
        raise UsageError(f"{where}: has another number of cells than the header")
    categories = tuple(part.strip() for part in values["categories"].split(",") if part.strip())
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown or not categories:
        raise UsageError(
            f"{where}: categories must be of {', '.join(CATEGORIES)}, got "
            f"{values['categories'][:80]!r}"
        )
    if not values["prompt"].strip():
        raise UsageError(f"{where}: the prompt must not be empty")
    width, height = (_whole(values[f"sd_image_{side}"], 8, 8192) for side in ("width", "height"))
    seed, guidance = _whole(values["sd_seed"], 0, 2**62), _number(values["sd_guidance_scale"])
    if width is None or height is None or seed is None or guidance is None:
        cells = ", ".join(f"{name} {values[name][:20]!r}" for name in USED[2:])
        raise UsageError(
            f"{where}: seed, guidance and size must be numbers, sizes of 8 to 8192 pixels, got "
            f"{cells}"
        )
    return Row(values["prompt"], categories, seed, guidance, width, height)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _whole(text: str, low: int, high: int) -> int | None:
    value = text.strip().removesuffix(".0")
    if not (value.isascii() and value.isdigit() and len(value) <= 19):
        return None
    return int(value) if low <= int(value) <= high else None
