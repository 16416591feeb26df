"""Shards and runs for the tests of many shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scan_helpers import latents_of

from latentguard import scan_files
from latentguard.policy import load_policy
from latentguard.scan.judging import Judging
from latentguard.scan.local import run_local
from latentguard.scan.options import RunOptions
from latentguard.scan.run import Run, open_run
from latentguard.scan.sinks import read_part

SAID = json.dumps({"space": "flux2", "scaled": True}).encode()


def member(name: str, data: bytes, into: tarfile.TarFile) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    into.addfile(header, io.BytesIO(data))


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_shard(path: Path, count: int = 4, seed: int = 0, keys: Sequence[str] = ()) -> Path:
    """A WebDataset shard of latents, with what is said of them and a caption."""
    latents = latents_of(count, seed).numpy()
    with tarfile.open(path, "w") as tar:
        for n, key in enumerate(keys or [f"{seed:03d}{n:03d}" for n in range(count)]):
            member(f"{key}.latent.npy", npy(latents[n]), tar)
            member(f"{key}.json", SAID, tar)
            member(f"{key}.txt", f"caption of {key}".encode(), tar)
    return path


def write_shards(folder: Path, shards: int = 3, count: int = 4) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [write_shard(folder / f"{n:05d}.tar", count, n) for n in range(shards)]


def options_of(policy: Path, **options: Any) -> RunOptions:
    return RunOptions(load_policy(policy), **options)


def scan_run(
    place: Path | str,
    options: RunOptions,
    paths: Sequence[Path | str] = (),
    workers: int = 0,
    resume: bool = False,
    **how: Any,
) -> Run:
    """A run to its end."""
    judges = options.judges()
    run = open_run(str(place), options, judges, [str(p) for p in paths], resume=resume)
    run_local(run, Judging(judges), workers=workers, **how)
    return run


def records_of(run: Run) -> list[dict[str, Any]]:
    """All records of a run on this machine, in the order of its shards."""
    parts = [run.done[shard.number].part for shard in run.shards if shard.number in run.done]
    return [row for part in parts for row in read_part(Path(run.place) / part.name)]


def plain(paths: Sequence[Path | str], policy: Path) -> list[dict[str, Any]]:
    """What `latentguard scan` says of the same, shard by shard."""
    return [record.to_dict() for path in paths for record in scan_files(path, policy)]
