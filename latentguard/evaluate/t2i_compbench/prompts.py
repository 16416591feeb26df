"""The benchmark's prompts, one a line, and the names that its evaluators take them from.

A picture is `samples/PROMPT_000000.png`: the evaluators read the prompt up to the first `_`, and
sort by the number after the last, which counts all pictures of a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from latentguard.errors import UsageError
from latentguard.evaluate.generate.asked import Asked
from latentguard.regular import problem, read_bounded
from latentguard.text import unseen

IMAGES = 10
SEED = 42

MAX_BYTES = 64 << 20
MAX_NAME = 240
"""Bytes of a prompt, so that a file system takes it with its number as a name."""


def read_prompts(path: Path) -> tuple[list[str], str]:
    """The prompts of a file (what stands before a tab), and the hex digest of its bytes.

    Raises UsageError for a file that cannot be read, and a prompt that cannot be a picture's name.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {problem(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8: {error.reason}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt = line.split("\t")[0].strip()
        if not prompt:
            continue
        if set(prompt) & set("/\\_") or prompt.startswith(".") or unseen(prompt):
            raise UsageError(
                f"{path}, line {number}: T2I-CompBench reads prompts from the names of pictures, "
                f"so this one must have no /, \\, _ or unseen character: {prompt[:80]!r}"
            )
        if len(prompt.encode()) > MAX_NAME:
            raise UsageError(f"{path}, line {number}: longer than {MAX_NAME} bytes")
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{path}: has no prompts")
    return prompts, hashlib.sha256(data).hexdigest()


def asked_of(prompts: Sequence[str], images: int = IMAGES, seed: int = SEED) -> list[Asked]:
    """`images` images of each prompt; the k-th of every prompt has the seed `seed` + k."""
    return [
        Asked(f"samples/{prompt}_{row * images + k:06}", row, k, prompt, seed + k)
        for row, prompt in enumerate(prompts)
        for k in range(images)
    ]
