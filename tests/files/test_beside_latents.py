"""What a file holds beside the latents that are read: a user of the file gets it, too."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_helpers import flux2_batch, npy_bytes, only_error, read_all, torch_bytes, write_tar
from safetensors.torch import save_file

from latentguard.files import PassedOver, read_arrays

SAYS: dict[str, Any] = {"space": "flux2", "scaled": True}
FIRST, SECOND = flux2_batch(1), flux2_batch(2)
SENTENCE = ", which could be latents but was not looked at"


def written(path: Path, **arrays: Any) -> Path:
    """The arrays in a file of any type."""
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    elif path.suffix == ".tar":
        write_tar(path, {"0.latent.pt": torch_bytes(arrays)})
    else:
        torch.save(arrays, path)
    return path


@pytest.fixture(params=[".pt", ".safetensors", ".npz", ".tar"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"a{request.param}"


@pytest.mark.parametrize(
    "other",
    [
        SECOND,
        SECOND[0].contiguous(),
        SECOND[None],
        SECOND.double(),
        torch.randn(1, 64, 128),
        torch.randn(256, 64),
        torch.randn(2, 4, 8, 8),
    ],
    ids=["batch", "image", "steps", "double", "packed", "tokens", "another space"],
)
def test_a_second_array_of_latents_is_an_error(path: Path, other: torch.Tensor) -> None:
    first, second = read_all(written(path, latents=FIRST, latents_2=other), **SAYS)
    assert first.error is None
    assert second.index == 1
    assert second.error is not None
    assert f"holds latents_2{SENTENCE}" in second.error


def test_what_cannot_be_latents_is_left_aside(path: Path) -> None:
    others = {
        "timesteps": torch.arange(4),
        "sigmas": torch.rand(20),
        "mask": torch.ones(1, 1, 8, 8),
        "images": torch.rand(4, 3, 64, 64),
        "features": torch.randn(1, 128),
        "preview": torch.zeros(1, 8, 8, 4, dtype=torch.uint8),
        "labels": torch.zeros(4, 8, 8, dtype=torch.int64),
        "none": torch.zeros(0, 32, 8, 8),
    }
    assert [
        record.error for record in read_all(written(path, latents=FIRST, **others), **SAYS)
    ] == [None]


def test_text_embeddings_are_counted(path: Path) -> None:
    """Those of four prompts have the shape of an image of four channels."""
    written(path, latents=FIRST, prompt_embeds=torch.zeros(4, 77, 768), t5=torch.zeros(4, 8, 4096))
    passed = PassedOver()
    assert [record.error for record in read_arrays(path, **SAYS, passed=passed)] == [None]
    assert passed.line() == "passed over, because they are not latents: 2 arrays of text embeddings"
    for shape in ((4, 77, 128), (1, 32, 8, 512)):
        other = written(path, latents=FIRST, prompt_embeds=torch.zeros(shape))
        assert "holds prompt_embeds," in (read_all(other, **SAYS)[-1].error or "")


@pytest.mark.parametrize(
    "value",
    [
        {"latents": FIRST, "more": {"latents": SECOND}},
        {"latents": FIRST, "more": [[1, (SECOND,)]]},
        {"image": FIRST, "more": [SECOND]},
        {"latents": [FIRST], "more": torch.nn.Parameter(SECOND)},
    ],
)
def test_tensors_in_lists_and_dicts_of_a_torch_file(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "a.pt")
    first, second = read_all(tmp_path / "a.pt", **SAYS)
    assert first.error is None
    assert SENTENCE in (second.error or "")


def test_latents_that_are_named_twice_are_read(tmp_path: Path) -> None:
    torch.save({"latents": FIRST, "same": FIRST, "list": [FIRST]}, tmp_path / "a.pt")
    assert [record.error for record in read_all(tmp_path / "a.pt", **SAYS)] == [None]


def test_keys_that_look_alike_are_two(tmp_path: Path) -> None:
    torch.save({"1": FIRST, 1: SECOND}, tmp_path / "a.pt")
    assert "needs the key latents, it holds 1, 1" in only_error(tmp_path / "a.pt", **SAYS)


def test_parts_of_an_npz_that_are_no_arrays(tmp_path: Path) -> None:
    """numpy.load gives their bytes."""
    path = tmp_path / "a.npz"

    def errors(name: str, data: bytes) -> list[str | None]:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("latents.npy", npy_bytes(FIRST.numpy()))
            archive.writestr(name, data)
        return [record.error for record in read_all(path, **SAYS)]

    assert errors("readme.txt", b"what these are") == [None]
    fortran = npy_bytes(np.asfortranarray(np.ones((3, 5))))
    assert errors("other.npy", fortran) == [None]
    for name, data in (
        ("x.pt", torch_bytes(SECOND)),
        ("x", torch_bytes(SECOND)),
        ("x.txt", torch_bytes(SECOND)),
        ("x", npy_bytes(SECOND.numpy())),
        ("x.npy", b"\x93NUMPY" + bytes(100)),
    ):
        first, second = errors(name, data)
        assert first is None
        assert SENTENCE in (second or "")


def test_an_npz_of_very_many_arrays(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", latents=FIRST.numpy(), **{f"a{i}": np.ones(1) for i in range(1001)}
    )
    assert "1001 arrays beside its latents" in only_error(tmp_path / "a.npz", **SAYS)
