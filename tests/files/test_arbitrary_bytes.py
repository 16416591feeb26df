"""Whatever bytes a file holds: records come out, exceptions do not."""

from __future__ import annotations

import gzip
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from files_helpers import flux2_batch, mds_bytes, npy_bytes, read_all, torch_bytes, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from latentguard.files import load_latents, save_latents
from latentguard.files.reading import SUFFIXES
from latentguard.spaces import SPACES, Latents

MAGIC = (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00v\x00", b"\x80\x02}", b"{", b"\x10\0\0\0\0\0\0\0{")
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(start=st.sampled_from(MAGIC), data=st.binary(max_size=1500))
@QUICK
def test_random_bytes(tmp_path: Path, suffix: str, start: bytes, data: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(start + data)
    assert all(record.error is not None for record in read_all(path))


@cache
def good_file(suffix: str, folder: Path) -> bytes:
    """A valid file of each type, two images."""
    path = folder / f"good{suffix}"
    batch = flux2_batch(2, 4)
    if suffix == ".npy":
        return npy_bytes(batch.numpy())
    if suffix == ".npz":
        import numpy as np

        np.savez_compressed(path, latents=batch.numpy(), space="flux2", scaled=True)
    elif suffix == ".tar":
        member = torch_bytes({"latents": batch[:1], "space": "flux2", "scaled": True})
        write_tar(path, {"a.latent.pt": member, "b.json": b"{}", "b.latent.pt": member})
    elif suffix == ".parquet":
        pa = pytest.importorskip(
            "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
        )
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"key": ["a", "b"], "latents": batch.numpy().tolist()}), path)
    elif ".mds" in suffix:
        columns = {"key": ("str", None), "latents": ("bytes", None)}
        sample = {"key": b"a", "latents": npy_bytes(batch[0].numpy())}
        data = mds_bytes(columns, [sample, sample])
        if suffix == ".mds":
            return data
        if suffix == ".mds.gz":
            return gzip.compress(data, mtime=0)
        pa = pytest.importorskip(
            "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
        )
        return bytes(pa.compress(data, "zstd", asbytes=True))
    elif suffix == ".latent":
        tensors = {"latent_tensor": batch, "latent_format_version_0": torch.tensor([])}
        save_file(tensors, path, metadata={"prompt": "{}"})
    else:
        save_latents(path, Latents(batch, "flux2", scaled=True, ids=["a", "b"]))
    return path.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    seed=st.integers(0, 2**32), flips=st.integers(1, 8), cut=st.floats(0, 1), early=st.booleans()
)
@QUICK
def test_damaged_files(
    tmp_path: Path, suffix: str, seed: int, flips: int, cut: float, early: bool
) -> None:
    chance = random.Random(seed)
    data = bytearray(good_file(suffix, tmp_path))
    if chance.random() < 0.3:
        del data[max(1, int(cut * len(data))) :]
    # The structure of most formats is at the beginning or the end.
    reach = min(len(data), 600)
    for _ in range(flips):
        at = chance.randrange(reach)
        data[at if early else len(data) - 1 - at] = chance.randrange(256)
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(data)
    read_all(path)
    read_all(path, space="flux2")


@given(
    name=st.sampled_from(sorted(SPACES)),
    scaled=st.booleans(),
    suffix=st.sampled_from([".pt", ".safetensors"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    count=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    ids=st.none() | st.lists(st.text(max_size=20), min_size=3, max_size=3),
    packed=st.booleans(),
)
@QUICK
def test_round_trip(
    tmp_path: Path,
    name: str,
    scaled: bool,
    suffix: str,
    dtype: torch.dtype,
    count: int,
    rows: int,
    columns: int,
    ids: list[str] | None,
    packed: bool,
) -> None:
    tensor = torch.randn(count, SPACES[name].channels, 2 * rows, 2 * columns).to(dtype)
    latents = Latents(tensor, name, scaled, ids=None if ids is None else ids[:count])
    packed = packed and SPACES[name].packed_patch > 1
    path = tmp_path / f"a{suffix}"
    save_latents(path, latents.to_packed() if packed else latents)
    back = load_latents(path)
    assert torch.equal(back.tensor, tensor)
    assert back.tensor.dtype == dtype
    assert (back.space, back.scaled, back.ids) == (latents.space, scaled, latents.ids)
