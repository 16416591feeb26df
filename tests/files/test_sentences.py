"""Files that are not read say in one sentence what they are and what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_helpers import flux2_batch, npy_bytes, only_error, read_all, torch_bytes
from safetensors.torch import save_file

SAYS: dict[str, Any] = {"space": "flux2", "scaled": True}
IMAGE = flux2_batch(1)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".npy", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("gzip", gzip.compress(b"x" * 100, mtime=0)),
        ("xz", lzma.compress(b"x" * 100)),
        ("bzip2", bz2.compress(b"x" * 100)),
        ("zstd", b"\x28\xb5\x2f\xfd" + b"x" * 100),
    ],
    ids=["gzip", "xz", "bzip2", "zstd"],
)
def test_compressed_files(tmp_path: Path, suffix: str, name: str, start: bytes) -> None:
    (tmp_path / f"a{suffix}").write_bytes(start)
    error = only_error(tmp_path / f"a{suffix}", **SAYS)
    if (name, suffix) == ("gzip", ".pt"):  # unpacked, as some trainers write it
        assert error == "is not a file of torch.save, or is truncated"
    else:
        assert error.startswith(f"is compressed with {name}: unpack it (")


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".npy", ".safetensors"])
def test_a_byte_order_mark_and_a_tar(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + torch_bytes(IMAGE))
    assert "begins with a byte order mark" in only_error(path, **SAYS)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "is a tar archive" in only_error(path, **SAYS)


def test_a_safetensors_header_whose_length_looks_like_a_magic_number(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"latents": IMAGE}, path, metadata={"note": " " * 35_000, "space": "flux2"})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    wanted = 0x8B1F  # gzip's magic number
    padded = wanted.to_bytes(8, "little") + raw[8 : 8 + length].ljust(wanted) + raw[8 + length :]
    path.write_bytes(padded)
    assert read_all(path, scaled=True)[0].error is None


def test_a_file_under_another_ending(tmp_path: Path) -> None:
    for name, data, kind in (
        ("a.npy", torch_bytes(IMAGE), "a zip archive"),
        ("a.pt", npy_bytes(IMAGE.numpy()), "what numpy.save writes"),
        ("a.npz", npy_bytes(IMAGE.numpy()), "what numpy.save writes"),
        ("a.safetensors", torch_bytes(IMAGE), ""),
    ):
        (tmp_path / name).write_bytes(data)
        assert kind in only_error(tmp_path / name, **SAYS)


def test_bfloat16_of_numpy_and_objects(tmp_path: Path) -> None:
    bits = IMAGE.bfloat16().view(torch.int16).numpy().view("V2")
    np.save(tmp_path / "a.npy", bits)
    np.savez(tmp_path / "b.npz", latents=bits, **SAYS)
    for name in ("a.npy", "b.npz"):
        error = only_error(tmp_path / name, **SAYS)
        assert "this is bfloat16 as numpy.save writes it" in error
        assert "astype(numpy.float32), or use safetensors" in error
    np.save(tmp_path / "c.npy", np.array([IMAGE.numpy(), None], dtype=object))
    assert "numpy.stack(list)" in only_error(tmp_path / "c.npy", **SAYS)


def test_torchscript(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "a.pt"))
    assert "TorchScript" in only_error(tmp_path / "a.pt", **SAYS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"model_input": IMAGE, "crop": torch.zeros(2)},
            "it holds model_input, crop: save the numbers that are latents (model_input?) under",
        ),
        ({f"{n}": torch.ones(n) for n in range(20)}, "holds 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"),
        ([{"latents": IMAGE}, {"x": 1}], "needs the key latents, it holds x"),
        ([{"latents": IMAGE}, IMAGE], "holds a list of dicts with a Tensor in it"),
        ({"prompt_embeds": IMAGE, "pooled": IMAGE}, "these are text embeddings"),
        ({("a", 0): IMAGE}, "save it with text as its keys"),
        ({"latents": IMAGE, "tags": {"a"}}, "save it without that"),
    ],
)
def test_dicts_and_lists_of_another_form(tmp_path: Path, value: Any, message: str) -> None:
    torch.save(value, tmp_path / "a.pt")
    assert message in only_error(tmp_path / "a.pt", **SAYS)


def test_types_and_devices_beside_the_latents_are_read(tmp_path: Path) -> None:
    more = {"dtype": torch.bfloat16, "device": torch.device("cuda", 0), "cpu": torch.device("cpu")}
    torch.save({"latents": IMAGE, **more, **SAYS}, tmp_path / "a.pt")
    assert read_all(tmp_path / "a.pt")[0].error is None


def test_text_embeddings(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", hidden_state1=np.ones(3), pool2=np.ones(3))
    assert "these are text embeddings" in only_error(tmp_path / "b.npz", **SAYS)
