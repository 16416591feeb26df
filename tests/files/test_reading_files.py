"""Every format that is read: same latents, same names, one record per image, in order."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_helpers import flux2_batch, npy_bytes, only_error, read_all, torch_bytes, write_tar

from latentguard.errors import LatentsError
from latentguard.files import Record, load_latents, read_latents, save_latents
from latentguard.files.bounds import MAX_MAGNITUDE
from latentguard.judge.numbers import LARGEST
from latentguard.spaces import SPACES, BatchNorm, Latents, LatentSpace

PHOTOS = Path(__file__).parents[1] / "spaces" / "taef2_photos.safetensors"
SAYS = {"space": "flux2", "scaled": True}


def stacked(records: list[Record]) -> torch.Tensor:
    return torch.cat([r.latents.tensor for r in records if r.latents is not None])


# -- .pt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_dict(tmp_path: Path, dtype: torch.dtype) -> None:
    batch = flux2_batch().to(dtype)
    path = tmp_path / "a.pt"
    # Other keys are ignored, whatever tensors, numbers and lists they hold.
    other = {"steps": 4, "timesteps": torch.arange(5), "prompt": ["a", None, 1.5, {"b": (1, 2)}]}
    torch.save({"latents": batch, **SAYS, "ids": ["a", 2, "c"], **other}, path)
    records = read_all(path)
    assert [r.id for r in records] == ["a", "2", "c"]
    assert [r.index for r in records] == [0, 1, 2]
    assert {r.source for r in records} == {str(path)}
    assert torch.equal(stacked(records), batch)
    first = records[0].latents
    assert first is not None
    assert (first.space, first.scaled, first.ids) == (SPACES["flux2"], True, ("a",))


def test_torch_tensor_and_parameter(tmp_path: Path) -> None:
    batch = flux2_batch()
    torch.save(batch, tmp_path / "a.pt")
    torch.save(torch.nn.Parameter(batch[0]), tmp_path / "b.PTH")
    assert torch.equal(stacked(read_all(tmp_path / "a.pt", **SAYS)), batch)
    (one,) = read_all(tmp_path / "b.PTH", **SAYS)
    assert one.latents is not None
    assert torch.equal(one.latents.tensor, batch[:1])
    assert not one.latents.tensor.requires_grad
    assert one.id is None


def test_torch_list_of_several_sizes(tmp_path: Path) -> None:
    images = [flux2_batch(1, size)[0] for size in (8, 12, 10)]
    torch.save(images, tmp_path / "a.pt")
    torch.save(
        {"latents": [images[0], images[1][None]], **SAYS, "ids": ["x", "y"]}, tmp_path / "b.pt"
    )
    records = read_all(tmp_path / "a.pt", **SAYS)
    assert [r.latents.height for r in records if r.latents] == [8, 12, 10]
    assert [r.id for r in read_all(tmp_path / "b.pt")] == ["x", "y"]
    with pytest.raises(
        LatentsError, match=r"several sizes \(8x8, 10x10, 12x12\): use read_latents"
    ):
        load_latents(tmp_path / "a.pt", **SAYS)


def test_torch_strides_and_shared_storages(tmp_path: Path) -> None:
    batch = flux2_batch()
    torch.save(batch.to(memory_format=torch.channels_last), tmp_path / "a.pt")
    torch.save(batch[1:], tmp_path / "b.pt")
    torch.save(batch.double().transpose(2, 3), tmp_path / "c.pt")
    torch.save([batch[0], batch[0]], tmp_path / "d.pt")
    assert torch.equal(stacked(read_all(tmp_path / "a.pt", **SAYS)), batch)
    assert torch.equal(stacked(read_all(tmp_path / "b.pt", **SAYS)), batch[1:])
    assert torch.equal(stacked(read_all(tmp_path / "c.pt", **SAYS)), batch.double().mT)
    assert len(read_all(tmp_path / "d.pt", **SAYS)) == 2


def test_torch_dict_with_one_tensor_of_another_name(tmp_path: Path) -> None:
    torch.save({"samples": flux2_batch(), **SAYS}, tmp_path / "a.pt")
    assert len(read_all(tmp_path / "a.pt")) == 3
    torch.save({"x": flux2_batch(), "y": flux2_batch(), **SAYS}, tmp_path / "b.pt")
    assert only_error(tmp_path / "b.pt") == (
        "needs the key latents, it holds x, y, space, scaled: save the numbers that are latents "
        "(x?) under the name latents, or say which they are (--key)"
    )


# -- the others ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_npy(tmp_path: Path, dtype: str) -> None:
    batch = flux2_batch().numpy().astype(dtype)
    np.save(tmp_path / "a.npy", batch)
    records = read_all(tmp_path / "a.npy", **SAYS)
    assert np.array_equal(stacked(records).numpy(), batch)
    np.save(tmp_path / "b.npy", batch[0])
    assert len(read_all(tmp_path / "b.npy", **SAYS)) == 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Any) -> None:
    batch = flux2_batch().numpy()
    save(tmp_path / "a.npz", latents=batch, ids=np.array(["a", "b", "c"]), other=np.ones(3), **SAYS)
    records = read_all(tmp_path / "a.npz")
    assert [r.id for r in records] == ["a", "b", "c"]
    assert np.array_equal(stacked(records).numpy(), batch)
    save(tmp_path / "b.npz", batch)
    assert len(read_all(tmp_path / "b.npz", **SAYS)) == 3
    save(tmp_path / "c.npz", x=batch, y=batch)
    assert only_error(tmp_path / "c.npz").startswith(
        "needs an array named latents, it holds x, y: save the numbers"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_of_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the torch extra")
    batch = flux2_batch().to(dtype)
    path = tmp_path / "a.safetensors"
    metadata = {"space": "flux2", "scaled": "True", "ids": '["a", "b", "c"]', "anything": "else {"}
    # A second tensor does not disturb where the first is called latents.
    safetensors.save_file({"latents": batch, "embeds": torch.ones(3)}, path, metadata=metadata)
    records = read_all(path)
    assert [r.id for r in records] == ["a", "b", "c"]
    assert torch.equal(stacked(records), batch)
    safetensors.save_file({"x": batch}, tmp_path / "b.safetensors")
    assert len(read_all(tmp_path / "b.safetensors", **SAYS)) == 3


def test_packed_tokens(tmp_path: Path) -> None:
    spatial = Latents(torch.randn(2, 16, 6, 4), "flux1", scaled=True)
    tokens = spatial.to_packed().tensor
    says = {"space": "flux1", "scaled": True, "height": 6, "width": 4}
    torch.save({"latents": tokens, "layout": "packed", **says}, tmp_path / "a.pt")
    torch.save({"latents": tokens, **says}, tmp_path / "b.pt")
    torch.save({"latents": tokens[0], "layout": "packed", **says}, tmp_path / "c.pt")
    np.savez(tmp_path / "d.npz", latents=tokens.numpy(), layout="packed", **says)
    for name in ("a.pt", "b.pt", "d.npz"):
        assert torch.equal(stacked(read_all(tmp_path / name)), spatial.tensor)
    assert torch.equal(stacked(read_all(tmp_path / "c.pt")), spatial.tensor[:1])


def test_packed_tokens_that_do_not_say_enough(tmp_path: Path) -> None:
    tokens = torch.randn(2, 6, 64)
    torch.save({"latents": tokens, "space": "flux1", "scaled": True}, tmp_path / "a.pt")
    assert "declare layout" in only_error(tmp_path / "a.pt")
    says = {"latents": tokens, "space": "flux1", "scaled": True, "layout": "packed"}
    torch.save(says, tmp_path / "b.pt")
    assert "give height and width in latent cells" in (read_all(tmp_path / "b.pt")[0].error or "")
    torch.save({**says, "height": 48, "width": 32}, tmp_path / "c.pt")
    assert "pixels / 8" in (read_all(tmp_path / "c.pt")[1].error or "")
    del says["space"], says["scaled"]
    torch.save(says, tmp_path / "d.pt")
    assert "packed latents are not recognized" in only_error(tmp_path / "d.pt")


def test_one_image_or_tokens_of_the_same_shape(tmp_path: Path) -> None:
    # [16, 64, 64] is one flux1 image of 64x64 cells, or 16 packed ones of 16x16.
    tensor = torch.randn(16, 64, 64)
    says = {"latents": tensor, "space": "flux1", "scaled": True}
    torch.save(says, tmp_path / "a.pt")
    torch.save({**says, "height": 16, "width": 16}, tmp_path / "b.pt")
    torch.save({**says, "height": 64, "width": 64}, tmp_path / "c.pt")
    assert [len(read_all(tmp_path / f"{name}.pt")) for name in "abc"] == [1, 16, 1]


# -- recognition and options -----------------------------------------------------------------


def test_real_latents_that_do_not_say(tmp_path: Path) -> None:
    photos = load_latents(PHOTOS).tensor
    np.save(tmp_path / "a.npy", photos.numpy())
    records = read_all(tmp_path / "a.npy")
    assert all(r.latents is not None and r.latents.scaled for r in records)
    assert records[0].latents is not None
    assert records[0].latents.space is SPACES["flux2"]


def test_the_question_is_the_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", torch.randn(5, 32, 16, 16).numpy())
    assert only_error(tmp_path / "a.npy").endswith(
        "so these look like noise: say --space flux2 or --space hunyuan-video-1.5 or --space sana"
        " and --scaled or --unscaled"
    )
    ramp = torch.linspace(-1, 1, 16).expand(5, 16, 16, 16) + torch.rand(5, 16, 16, 16) / 10
    np.save(tmp_path / "b.npy", ramp.numpy())
    assert only_error(tmp_path / "b.npy") == (
        "sd3, flux1, wan21, hunyuan-video and cosmos1 have the same shape, and no published "
        "statistics tell which: say --space sd3 or --space flux1 or --space wan21 or "
        "--space hunyuan-video or --space cosmos1 and --scaled or --unscaled"
    )
    assert len(read_all(tmp_path / "b.npy", space="sd3", scaled=False)) == 5


def test_an_option_that_contradicts_the_file(tmp_path: Path) -> None:
    torch.save({"latents": flux2_batch(), **SAYS}, tmp_path / "a.pt")
    assert only_error(tmp_path / "a.pt", space="sdxl") == (
        "the file says space 'flux2', the option given says 'sdxl'"
    )
    assert "says scaled True, the option given says False" in only_error(
        tmp_path / "a.pt", scaled=False
    )
    assert len(read_all(tmp_path / "a.pt", space="flux2", scaled=True)) == 3


def test_wrong_options_raise_at_once() -> None:
    with pytest.raises(LatentsError, match="use one of"):
        read_latents(["x.pt"], space="sd2")
    with pytest.raises(LatentsError, match="True, False or None"):
        read_latents(["x.pt"], scaled="yes")  # type: ignore[arg-type]


def test_a_space_with_statistics_is_used(tmp_path: Path) -> None:
    statistics = BatchNorm([0.0] * 128, [3.0] * 128)
    space = SPACES["flux2"].with_batch_norm(*statistics)
    np.save(tmp_path / "a.npy", flux2_batch().numpy())
    (first, *_) = read_all(tmp_path / "a.npy", space=space, scaled=False)
    assert first.latents is not None
    assert first.latents.to_scaled().scaled


# -- paths -----------------------------------------------------------------------------------


def test_folders_globs_and_order(tmp_path: Path) -> None:
    for name in ("b/2.pt", "b/10.pt", "a/x.npy", "z.safetensors", "[1].pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".npy"):
            np.save(tmp_path / name, flux2_batch().numpy())
        elif name.endswith(".safetensors"):
            shutil.copy(PHOTOS, tmp_path / name)
        else:
            torch.save({"latents": flux2_batch(1), **SAYS}, tmp_path / name)
    (tmp_path / "a" / "readme.txt").write_text("what these are", encoding="utf-8")

    def sources(path: str | Path) -> list[str]:
        records = read_latents([path], **SAYS)
        return list(dict.fromkeys(os.path.relpath(r.source, tmp_path) for r in records))

    everything = ["[1].pt", "z.safetensors", "a/x.npy", "b/10.pt", "b/2.pt"]
    assert sources(tmp_path) == everything
    assert sources(f"{tmp_path}/*/*.pt") == ["b/10.pt", "b/2.pt"]
    assert sources(f"{tmp_path}/**/*.pt") == ["[1].pt", "b/10.pt", "b/2.pt"]
    # A file whose name looks like a pattern is that file.
    assert sources(f"{tmp_path}/[1].pt") == ["[1].pt"]
    # A single path, not in a list, is no sequence of letters.
    assert len(list(read_latents(str(tmp_path), **SAYS))) == 10


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.pt").touch()
    os.mkfifo(tmp_path / "pipe.pt")
    os.symlink(tmp_path / "nothing", tmp_path / "dangling.pt")
    assert only_error(tmp_path / "no.pt") == "does not exist"
    assert only_error(f"{tmp_path}/*.npy") == "matches no file"
    assert "folder without latents files (.pt, .pth" in only_error(tmp_path / "empty")
    assert "unknown type: known are .pt" in only_error(tmp_path / "a.txt")
    (tmp_path / "a.JPG").touch()
    assert "is a picture, not latents: `latentguard encode`" in only_error(tmp_path / "a.JPG")
    assert only_error(tmp_path / "a.pt") == "is an empty file"
    assert only_error(tmp_path / "pipe.pt") == "is not a regular file"
    assert "cannot be opened" in only_error(tmp_path / "dangling.pt")
    assert only_error("a\0b.pt") == "does not exist"
    assert only_error("/dev/null") == "is of an unknown type: known are " + (
        ".pt, .pth, .safetensors, .latent, .npy, .npz, .tar, .parquet, .mds, .mds.zstd, .mds.zst, "
        ".mds.gz"
    )


def test_the_rest_is_still_read(tmp_path: Path) -> None:
    torch.save({"latents": flux2_batch(1), **SAYS}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"rubbish")
    torch.save({"latents": flux2_batch(2), **SAYS}, tmp_path / "c.pt")
    records = list(read_latents([tmp_path, "nowhere.pt", tmp_path / "a.pt"]))
    assert [r.error is None for r in records] == [True, False, True, True, False, True]


def test_one_bad_image_among_good_ones(tmp_path: Path) -> None:
    batch = flux2_batch(4)
    batch[1, 3, 2, 2] = float("nan")
    batch[2, 0, 0, 0] = float("-inf")
    np.save(tmp_path / "a.npy", batch.numpy())
    records = read_all(tmp_path / "a.npy", **SAYS)
    assert [r.error for r in records] == [None, *["the latents hold NaN or Inf"] * 2, None]
    with pytest.raises(LatentsError, match=r"a\.npy, image 1: the latents hold NaN or Inf"):
        load_latents(tmp_path / "a.npy", **SAYS)
    batch[1:3] = 0
    batch[1, 3, 2, 2] = -3e38
    np.save(tmp_path / "d.npy", batch.numpy())
    errors = [r.error for r in read_all(tmp_path / "d.npy", **SAYS)]
    assert errors == [None, "the latents hold numbers up to 3e+38; none exceed 1e+06", None, None]
    assert MAX_MAGNITUDE == LARGEST
    # The convention is recognized from the images that can be read.
    photos = load_latents(PHOTOS).tensor.clone()
    photos[0] = float("inf")
    np.save(tmp_path / "b.npy", photos.numpy())
    assert [r.error is None for r in read_all(tmp_path / "b.npy")] == [False, True, True, True]
    np.save(tmp_path / "c.npy", np.full((2, 4, 8, 8), np.nan, np.float32))
    assert [r.error for r in read_all(tmp_path / "c.npy")] == ["the latents hold NaN or Inf"] * 2


def test_reading_is_lazy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", flux2_batch(2).numpy())
    records = read_latents([tmp_path / "a.npy", tmp_path / "b.npy"], **SAYS)
    assert next(records).error is None
    np.save(tmp_path / "b.npy", flux2_batch(1).numpy())
    assert [r.error for r in records] == [None, None]


# -- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_save_and_load(tmp_path: Path, suffix: str, packed: bool, dtype: torch.dtype) -> None:
    path = tmp_path / f"a{suffix}"
    tensor = torch.randn(3, 16, 4, 6).to(dtype)[1:]
    latents = Latents(tensor, "flux1", scaled=False, ids=["ä", "b c"])
    save_latents(path, latents.to_packed() if packed else latents, license="CC0", steps=[1, 2])
    back = load_latents(path)
    assert torch.equal(back.tensor, tensor)
    assert (back.space, back.scaled, back.ids) == (latents.space, False, latents.ids)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    # A slice is saved without the storage it is a view of.
    assert path.stat().st_size < tensor.nbytes + 4096


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_scaling_of_its_own_is_saved_and_read_by_who_gives_it(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    for space in (
        LatentSpace.get("sdxl-playground25"),
        SPACES["flux2"].with_batch_norm([0.25] * 128, [3.0] * 128),
    ):
        for scaled in (True, False):
            latents = Latents(torch.randn(1, space.channels, 4, 4), space, scaled)
            save_latents(path, latents)
            back = load_latents(path, space)
            assert back.space == space
            assert torch.equal(back.to_raw().tensor, latents.to_raw().tensor)
            if scaled and space.name == "flux2":  # normalized by any statistics
                back = load_latents(path)
                assert back.space == SPACES["flux2"]
                assert torch.equal(back.tensor, latents.tensor)
            else:
                assert "declares a scaling of its own" in only_error(path)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    latents = Latents(torch.randn(1, 4, 4, 4), "sdxl", scaled=True)
    with pytest.raises(LatentsError, match=r"written as \.pt or \.safetensors"):
        save_latents(tmp_path / "a.npy", latents)
    with pytest.raises(LatentsError, match="metadata space follows from the latents"):
        save_latents(tmp_path / "a.pt", latents, space="sdxl")
    with pytest.raises(LatentsError, match="must be JSON"):
        save_latents(tmp_path / "a.pt", latents, thing=object())
    assert list(tmp_path.iterdir()) == []


# -- shards ----------------------------------------------------------------------------------


def test_shard(tmp_path: Path) -> None:
    batch = flux2_batch(4)
    path = write_tar(
        tmp_path / "a.tar",
        {
            "000.jpg": b"not read",
            "000.json": b'{"space": "flux2", "scaled": true, "caption": "x"}',
            "000.latent.pt": torch_bytes(batch[0]),
            "001.latent.npy": npy_bytes(batch[1].numpy()),
            "001.txt": b"not read",
            "001.json": b'{"space": "flux2", "scaled": true, "id": "named"}',
            "b.v2/002.latent.pt": torch_bytes({"latents": batch[2:], **SAYS}),
            "003.latent.safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
        },
    )
    records = read_all(path)
    assert [r.id for r in records] == ["000", "named", "b.v2/002", "b.v2/002", None]
    assert [r.index for r in records] == [0, 1, 2, 3, 4]
    assert records[0].source == f"{path}::000.latent.pt"
    assert records[4].error == "needs a tensor named latents, it holds nothing"
    assert torch.equal(stacked(records), batch)
    assert all(r.latents is not None and r.latents.scaled for r in records[:4])


@pytest.mark.parametrize("name", ["x" * 120, "ü" * 200, "d" * 160 + "/" + "e" * 200])
@pytest.mark.parametrize("kind", ["GNU_FORMAT", "PAX_FORMAT"])
def test_long_member_names(tmp_path: Path, name: str, kind: str) -> None:
    import tarfile

    path = write_tar(
        tmp_path / "a.tar",
        {f"{name}.latent.npy": npy_bytes(flux2_batch(1).numpy())},
        format=getattr(tarfile, kind),
    )
    (record,) = read_all(path, **SAYS)
    assert record.id == name


def test_shards_of_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="compares with webdataset's own writer")
    batch = flux2_batch(2)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for index, image in enumerate(batch):
            writer.write({"__key__": f"{index:06}", "latent.pt": torch_bytes(image), "json": SAYS})
    records = read_all(tmp_path / "a.tar")
    assert [r.id for r in records] == ["000000", "000001"]
    assert torch.equal(stacked(records), batch)
