"""Prompts: a text file with one a line, or GenEval's evaluation_metadata.jsonl."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from latentguard.errors import UsageError
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.geneval import prompts as geneval
from latentguard.regular import problem, read_bounded

MAX_BYTES = 64 << 20


def read_prompts(path: Path) -> tuple[list[str], str]:
    """The prompts of a file, and the hex digest of its bytes.

    Of a `.jsonl` GenEval's. Else what stands before a tab in each line that is not blank, as in
    T2I-CompBench's files.

    Raises UsageError for a file that cannot be read, and one without prompts.
    """
    if path.suffix == ".jsonl":
        lines, sha256 = geneval.read_prompts(path)
        return [line.text for line in lines], sha256
    try:
        data = read_bounded(path, MAX_BYTES)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: {problem(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8: {error.reason}") from error
    prompts = [line.split("\t")[0].strip() for line in text.splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UsageError(f"{path}: has no prompts")
    return prompts, hashlib.sha256(data).hexdigest()


def asked_of(prompts: Sequence[str], images: int, seed: int) -> list[Asked]:
    """`images` images of each prompt; the k-th of every prompt has the seed `seed` + k."""
    return [
        Asked(f"{row:05}/{index:04}", row, index, prompt, seed + index)
        for row, prompt in enumerate(prompts)
        for index in range(images)
    ]
