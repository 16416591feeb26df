"""What whoever gives files says of them: `Reading`, and the options that it is made of."""

from __future__ import annotations

import copy
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_helpers import flux2_batch, npy_bytes, only_error, read_all, torch_bytes, write_tar
from safetensors.torch import save_file

from latentguard.errors import LatentsError
from latentguard.files import (
    PassedOver,
    Reading,
    load_latents,
    read_arrays,
    read_records,
    save_latents,
)
from latentguard.spaces import SPACES, Latents, LatentSpace

SAYS: dict[str, Any] = {"space": "flux2", "scaled": True}
IMAGE = flux2_batch(1)
OTHER = flux2_batch(2)


# -- the object ------------------------------------------------------------------------------


def space_read(path: Path, reading: Reading) -> str:
    """What another process does with a reading that it was sent."""
    (record,) = read_records(str(path), reading)
    assert record.latents is not None, record.error
    return record.latents.space.name


def test_a_reading_goes_to_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a space of one's own, which that process does not know."""
    monkeypatch.setattr("latentguard.spaces.space.SPACES", dict(SPACES))
    space = LatentSpace("mine", channels=5, scale=2.0, vae_scale_factor=8)
    reading = Reading.of(space, True, key="x", member="*.latents.npy", dequantize="0.5,127")
    assert (reading.member, reading.dequantize) == ("latents.npy", (0.5, 127.0))
    np.savez(tmp_path / "a.npz", x=np.ones((5, 4, 4), np.float32))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(space_read, tmp_path / "a.npz", reading).result() == "mine"
        assert pool.submit(copy.copy, reading).result() == reading


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaled": "yes"}, "scaled must be True, False or None"),
        ({"pixels": 1}, "pixels must be True or False"),
        ({"key": ""}, "key must be a name"),
        ({"member": 3}, "member must be a name"),
        ({"dtype": "float8"}, "dtype must be bfloat16, float16"),
        ({"height": 0}, "height must be"),
        ({"layout": "tokens"}, "layout must be spatial or packed or patches"),
        *[
            ({"dequantize": value}, "dequantize must be SCALE,ZERO")
            for value in ("1", "1,2,3", "a,b", "0,1", "nan,1", (1,), (True, 1), "1e9,0", "imagenet")
        ],
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LatentsError, match=message):
        Reading.of(**options)


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="unknown options of reading: keys"):
        Reading.of(keys="x")


# -- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["vae/clean", "vae.clean"])
def test_a_path_of_keys(tmp_path: Path, key: str) -> None:
    value = {"vae": {"clean": IMAGE, "noisy": OTHER}, "prompt_embeds": torch.ones(1, 77, 4096)}
    torch.save(value, tmp_path / "a.pt")
    passed = PassedOver()
    (record,) = read_arrays(tmp_path / "a.pt", **SAYS, passed=passed, key=key)
    assert record.error is None
    assert (passed.left, passed.texts) == (1, 0)
    assert torch.equal(load_latents(tmp_path / "a.pt", **SAYS, key=key).tensor, IMAGE)
    error = only_error(tmp_path / "a.pt", **SAYS, key="vae/x")
    assert error == "needs 'vae/x', as --key says, it holds vae, prompt_embeds"


def test_what_is_said_under_a_key_counts(tmp_path: Path) -> None:
    inner = {"latents": IMAGE, "space": "flux2", "scaled": True, "ids": ["cat"]}
    torch.save({"sample": inner, "latents": OTHER}, tmp_path / "a.pt")
    (record,) = read_all(tmp_path / "a.pt", key="sample")
    assert (record.id, record.error) == ("cat", None)
    assert "says space 'flux2'" in only_error(tmp_path / "a.pt", key="sample", space="sana")
    torch.save({"sample": inner, "scaled": False}, tmp_path / "b.pt")
    assert "what is under 'sample' says scaled True" in only_error(tmp_path / "b.pt", key="sample")
    torch.save({"sample": {"moments": torch.zeros(1, 64, 8, 8)}}, tmp_path / "c.pt")
    assert [r.error for r in read_all(tmp_path / "c.pt", **SAYS, key="sample")] == [None]


def test_a_key_with_a_dot_comes_before_a_path(tmp_path: Path) -> None:
    torch.save({"a.b": IMAGE, "a": {"b": OTHER}}, tmp_path / "a.pt")
    assert torch.equal(load_latents(tmp_path / "a.pt", **SAYS, key="a.b").tensor, IMAGE)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_key_of_each_type(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    arrays = {"clean": IMAGE, "noisy": OTHER}
    if suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    elif suffix == ".safetensors":
        save_file(arrays, path)
    else:
        torch.save(arrays, path)
    assert "or say which they are (--key)" in only_error(path, **SAYS)
    assert torch.equal(load_latents(path, **SAYS, key="noisy").tensor, OTHER)
    assert "as --key says" in only_error(path, **SAYS, key="x")


def test_a_key_of_a_list_of_dicts(tmp_path: Path) -> None:
    torch.save([{"x": IMAGE, "y": OTHER}, {"x": OTHER, "y": IMAGE}], tmp_path / "a.pt")
    assert len(read_all(tmp_path / "a.pt", **SAYS, key="x")) == 3
    torch.save({"samples": [{"x": IMAGE}, {"x": IMAGE}]}, tmp_path / "b.pt")
    records = read_all(tmp_path / "b.pt", **SAYS, key="samples")
    assert [record.error for record in records] == [None, None]


def test_a_key_of_what_is_no_latents(tmp_path: Path) -> None:
    torch.save({"latents": IMAGE, "x": "text", "n": torch.ones(3)}, tmp_path / "a.pt")
    assert "must be tensors, got str" in only_error(tmp_path / "a.pt", **SAYS, key="x")
    assert "got shape [3]" in only_error(tmp_path / "a.pt", **SAYS, key="n")


# -- members ---------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["latents.npy", ".latents.npy", "*.latents.npy"])
def test_members_of_another_ending(tmp_path: Path, member: str) -> None:
    numbers = npy_bytes(IMAGE.numpy())
    members = {
        "000.latents.npy": numbers, "000.json": b'{"id": "first"}', "000.txt": b"a",
        "001.Latents.NPY": numbers, "001.moments.npy": numbers, "002.npy": numbers,
    }  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    passed = PassedOver()
    records = list(read_arrays(path, **SAYS, passed=passed, member=member))
    assert [(record.id, record.error) for record in records] == [("first", None), ("001", None)]
    assert passed.left_members == 2
    assert passed.members == {".txt": 1}
    (record,) = read_arrays(path, **SAYS)
    assert "(--member latents.npy)" in (record.error or "")


def test_a_member_that_is_not_there_or_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"000.vae": npy_bytes(IMAGE.numpy())})
    assert only_error(path, **SAYS, member="npy") == "holds no KEY.npy, as --member says"
    assert "is of an unknown type: known are .pt" in only_error(path, **SAYS, member="vae")


@pytest.mark.parametrize("member", ["pt", "pth", "latent"])
def test_members_of_other_types(tmp_path: Path, member: str) -> None:
    if member == "latent":
        save_file({"latent_tensor": IMAGE}, tmp_path / "x")
        data = (tmp_path / "x").read_bytes()
    else:
        data = torch_bytes({"latents": IMAGE})
    path = write_tar(tmp_path / "a.tar", {f"000.{member}": data})
    assert [r.error for r in read_all(path, space="flux2", scaled=True, member=member)] == [None]


# -- sizes -----------------------------------------------------------------------------------


def test_pixels_that_are_no_cells(tmp_path: Path) -> None:
    tokens = torch.zeros(1, 16, 128)
    torch.save({"latents": tokens, "height": 60, "width": 64}, tmp_path / "a.pt")
    assert "60 pixels are not a whole number of latent cells of flux2" in only_error(
        tmp_path / "a.pt", **SAYS, layout="packed", pixels=True
    )


def test_the_size_of_a_picture_does_not_disturb(tmp_path: Path) -> None:
    """Of spatial latents the array is the word: the picture may have been cropped."""
    torch.save({"latents": IMAGE, "height": 480, "width": 640}, tmp_path / "a.pt")
    assert [r.error for r in read_all(tmp_path / "a.pt", **SAYS, pixels=True)] == [None]
    torch.save({"latents": IMAGE, "height": 64, "width": 64}, tmp_path / "a.pt")
    assert only_error(tmp_path / "a.pt", **SAYS).endswith("divide them by 8, or say --pixels")
    torch.save({"latents": IMAGE[0], "height": 64, "width": 64}, tmp_path / "a.pt")
    assert "say --pixels" in only_error(tmp_path / "a.pt", **SAYS)


def test_a_size_in_cells_and_one_in_pixels(tmp_path: Path) -> None:
    tokens = {"0.latent.npy": npy_bytes(np.zeros((1, 16, 128), np.float32))}
    says = {"width": 64, "height": 64, "original_width": 640, "original_height": 480}
    path = write_tar(tmp_path / "a.tar", {"0.json": json.dumps(says).encode(), **tokens})
    said = {**SAYS, "layout": "packed"}
    assert [r.error for r in read_all(path, **said)] == [None]
    assert [r.error for r in read_all(path, **said, height=8, width=8)] == [None]
    assert "64 pixels are not 4 latent cells" in only_error(path, **said, height=4, width=16)


def test_a_file_that_says_its_layout_speaks_of_cells(tmp_path: Path) -> None:
    save_latents(tmp_path / "a.pt", Latents(IMAGE, "flux2", True).to_packed())
    said = {"layout": "packed", "pixels": True}
    assert [r.error for r in read_all(tmp_path / "a.pt", **said, height=64, width=64)] == [None]
    error = only_error(tmp_path / "a.pt", **said, height=128, width=64)
    assert "128 pixels are not 8 latent cells" in error
    torch.save({"latents": IMAGE, "height": 64, "width": 64}, tmp_path / "b.pt")
    error = only_error(tmp_path / "b.pt", **SAYS, height=128, width=64, pixels=True)
    assert error == "the file says pixel height 64, the metadata next to it says 128"


# -- strictness ------------------------------------------------------------------------------


def test_strict_lets_nothing_be_passed_over(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGE.numpy())
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.md").write_text("x")
    write_tar(tmp_path / "c.tar", {"0.latent.npy": npy_bytes(IMAGE.numpy()), "0.txt": b"a"})
    torch.save({"latents": IMAGE, "prompt_embeds": torch.ones(4, 77, 768)}, tmp_path / "d.pt")
    passed = PassedOver()
    records = list(read_records(tmp_path, Reading.of(**SAYS, strict=True), passed))
    errors = [record.error for record in records if record.error]
    assert len(records) - len(errors) == 3
    sentence = "is not a latents file, and with --strict no file is passed over"
    assert errors.count(sentence) == 2
    assert "1 member is not latents (0.txt), and with --strict no member is passed over" in errors
    assert "holds text embeddings, and with --strict no file is passed over" in errors
    assert passed.names == ["a.txt", "b/notes.md"]
    assert all(r.error is None for r in read_arrays(tmp_path, **SAYS))


def test_counts_of_parts_are_added_up() -> None:
    whole, part = PassedOver(), PassedOver(links=1, texts=2, left=3, left_members=4)
    for name in ("a.txt", "b\n.txt", "c.md", "d.md"):
        part.add_file(name)
    part.add_member("x.txt")
    whole.add(part)
    whole.add(part)
    assert whole.files == {".txt": 4, ".md": 4}
    assert whole.line() == (
        "passed over, because they are not latents: 8 files (.txt 4, .md 4), 2 shard members "
        "(.txt 2), 2 links to folders that are read, 4 arrays of text embeddings; "
        "the first files: a.txt, b?.txt, c.md, "
        "...; skipped on request: 6 other arrays (--key), 8 other shard members (--member)"
    )
