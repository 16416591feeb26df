"""What the tests of the files room share."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentguard.files import Record, read_latents


def flux2_batch(count: int = 3, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 32, size, size, generator=generator)


def read_all(path: Path | str, **options: Any) -> list[Record]:
    """The records of one path, each with exactly one of latents and error."""
    records = list(read_latents([path], **options))
    assert records, "a file without records is a silent pass"
    for record in records:
        assert (record.latents is None) != (record.error is None)
        if record.latents is not None:
            assert record.latents.layout == "spatial"
            assert len(record.latents) == 1
        else:
            assert record.error
            assert "\n" not in record.error
            assert len(record.error) < 600
    return records


def only_error(path: Path | str, **options: Any) -> str:
    """The error of a path that gives nothing else."""
    (record,) = read_all(path, **options)
    assert record.error is not None
    return record.error


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def npy_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def mds_bytes(columns: dict[str, tuple[str, int | None]], samples: list[dict[str, bytes]]) -> bytes:
    """A shard as MDSWriter writes it: columns with their encoding and size, encoded values."""
    names = sorted(columns)
    config = json.dumps(
        {
            "column_encodings": [columns[name][0] for name in names],
            "column_names": names,
            "column_sizes": [columns[name][1] for name in names],
            "compression": None, "format": "mds", "hashes": [], "size_limit": 1 << 26, "version": 2,
        },
        sort_keys=True,
    ).encode()  # fmt: skip
    encoded = []
    for sample in samples:
        varying = [len(sample[name]) for name in names if columns[name][1] is None]
        head = np.array(varying, np.uint32).tobytes()
        encoded.append(head + b"".join(sample[name] for name in names))
    offsets = np.array([0, *map(len, encoded)]).cumsum().astype(np.uint32)
    offsets += np.uint32(4 + offsets.nbytes + len(config))
    return np.uint32(len(encoded)).tobytes() + offsets.tobytes() + config + b"".join(encoded)
