"""From pictures to one latents file, with everything that is known about each picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from latentguard.atomic import replacing
from latentguard.encode.encoding import Encoded, Encoding
from latentguard.encode.journal import write_problems
from latentguard.encode.run import Advance, Outcome, strict_error
from latentguard.encode.samples import Problem
from latentguard.encode.sources import Sources
from latentguard.errors import LatentsError, UsageError
from latentguard.files import read_arrays, save_latents
from latentguard.files.writing import description
from latentguard.spaces import Latents

_MAX_CLASSES = 100_000
SUFFIXES = (".safetensors", ".pt", ".pth", ".npy")


def encode_to_file(
    out: Path,
    sources: Sources,
    encoding: Encoding,
    *,
    strict: bool = False,
    advance: Advance = lambda count: None,
) -> Outcome:
    """Write the latents of all pictures, which must come out in one size, as one array.

    Beside it lie, where there are any, `NAME.problems.jsonl`, and `NAME.labels.txt` with
    `NAME.names.txt` as `latentguard evaluate zeroshot` reads them. A .npy holds numbers alone:
    what they are, and ids and captions, stand in `NAME.json`.

    Raises:
        UsageError: another suffix, or pictures that keep their shapes.
        LatentsError: no picture could be encoded, or one could not and `strict` is True; or there
            is more text than a file may have.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{out}: a latents file must end in {', '.join(SUFFIXES)}; or give a folder"
        )
    found: list[Encoded] = []
    problems: list[Problem] = []
    for item in encoding.run(sample for unit in sources.units for sample in unit.samples()):
        if isinstance(item, Problem):
            if strict:
                raise strict_error(item)
            problems.append(item)
        else:
            if found and item.latents.tensor.shape != found[0].latents.tensor.shape:
                raise UsageError(
                    f"{out}: one array holds latents of one size, and {item.sample.id} has "
                    "another than the pictures before it: give a folder, or a --size and --crop "
                    "that make all alike"
                )
            found.append(item)
        advance(1)
    _write_problems(out, problems)
    if not found:
        first = f": {problems[0].source} {problems[0].error}" if problems else ""
        raise LatentsError(f"no picture could be encoded{first}")
    latents = Latents.cat([one.latents for one in found])
    values = _values(found, encoding)
    if out.suffix.lower() == ".npy":
        _save_npy(out, latents, values)
    else:
        save_latents(out, latents, **values)
        _check(out)
    _write_labels(out, found, sources.classes)
    return Outcome(len(found), problems, 1)


def _values(found: list[Encoded], encoding: Encoding) -> dict[str, Any]:
    """What is written beside the latents: a list for the pictures, where any has it."""
    columns: dict[str, list[Any]] = {
        "captions": [one.sample.caption for one in found],
        "labels": [one.sample.label for one in found],
        "label_names": [one.sample.label_name for one in found],
    }
    known = {key: list_ for key, list_ in columns.items() if any(v is not None for v in list_)}
    pictures = [[one.width, one.height, *map(float, one.box)] for one in found]
    return {
        **known,
        "pictures": pictures,
        "encoded": encoding.how.said(encoding.autoencoder),
    }


def _check(out: Path) -> None:
    """LatentsError, and no file, where ids and captions are more than readers take of a file."""
    first = next(iter(read_arrays([out])))
    if first.error is not None:
        out.unlink()
        raise LatentsError(f"{out}: one file cannot be read again ({first.error}); give a folder")


def _save_npy(out: Path, latents: Latents, values: dict[str, Any]) -> None:
    import torch

    if latents.tensor.dtype == torch.bfloat16:
        raise UsageError(f"{out}: .npy has no bfloat16; --store float16 or float32")
    with replacing(out.with_suffix(".json")) as file:
        file.write(json.dumps({**description(latents), **values}, indent=1).encode())
    with replacing(out) as file:
        np.save(file, latents.tensor.numpy(), allow_pickle=False)


def _write_labels(out: Path, found: list[Encoded], classes: tuple[str, ...]) -> None:
    labels = [label for one in found if isinstance(label := one.sample.label, int) and label >= 0]
    if len(labels) < len(found):
        return
    _write_lines(out.with_suffix(".labels.txt"), labels)
    named = {one.sample.label: one.sample.label_name for one in found}
    every = range(min(max(labels) + 1, _MAX_CLASSES))
    _write_lines(out.with_suffix(".names.txt"), classes or [named.get(n) or str(n) for n in every])


def _write_lines(path: Path, lines: Iterable[object]) -> None:
    with replacing(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _write_problems(out: Path, problems: list[Problem]) -> None:
    target = out.with_suffix(".problems.jsonl")
    if problems or target.exists():
        write_problems(target, problems)
