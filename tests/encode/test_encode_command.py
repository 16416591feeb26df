"""`latentguard encode`, through its entry point: what is written, and how a run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from encode_helpers import photo_bytes, read_tar, rows, save_to_disk, write_tar
from safetensors import safe_open

from latentguard.cli.encode import register
from latentguard.encode import Autoencoder, encode_pictures
from latentguard.encode.encoding import Encoding
from latentguard.encode.run import Task
from latentguard.errors import LatentGuardError, LatentsError, ModelError
from latentguard.files import load_latents, read_latents

Command = Callable[..., Any]
APP = typer.Typer()
register(APP)
COMMAND: Any = typer.main.get_command(APP)


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def encode(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command without the others, whose options alone take half a second to make."""

    def run(*arguments: object) -> Ran:
        given = [*arguments, "--autoencoder", tiny_file, "--size", 32]
        try:
            code = COMMAND.main([str(one) for one in given], standalone_mode=False)
        except LatentGuardError as error:
            return Ran(2, capsys.readouterr().out, str(error))
        captured = capsys.readouterr()
        return Ran(code or 0, captured.out, captured.err)

    return run


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")
    }


# -- what is written -------------------------------------------------------------------------


def test_a_folder_to_shards_that_scan_reads(
    command: Command, tiny_file: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = command(
        "encode", photos, "-o", out, "--autoencoder", tiny_file, "--size", 32,
        "--labels", "folder", "--shard-size", 3,
    )  # fmt: skip
    assert (ran.code, ran.out) == (0, f"{out}: latents of 5 pictures in 2 shards\n")
    assert sorted(path.name for path in out.iterdir()) == [
        "000000-0000.tar", "000001-0000.tar", "encode.json", "names.txt", "pictures-1.jsonl",
    ]  # fmt: skip
    assert (out / "names.txt").read_text() == "cat\ndog\n"
    members = read_tar(out / "000000-0000.tar")
    assert [name for name in members if "000001." in name] == [
        f"000000-0000-000001.{ending}" for ending in ("latent.npy", "json", "txt", "cls")
    ]
    said = json.loads(members["000000-0000-000001.json"])
    assert (said["id"], said["space"], said["scaled"]) == ("cat/b.png", "flux2", True)
    assert (said["height"], said["width"], said["layout"]) == (4, 4, "spatial")
    assert (said["label"], said["label_name"]) == (0, "cat")
    assert said["picture"]["width"] == 48
    assert said["picture"]["box"] == [0, 4, 48, 52]
    assert (
        said["picture"]["sha256"] == hashlib.sha256((photos / "cat/b.png").read_bytes()).hexdigest()
    )
    assert said["encoded"]["autoencoder"]["name"] == "taef2_encoder.pth"
    assert members["000000-0000-000001.txt"] == b"a cat on a chair"
    assert members["000000-0000-000001.cls"] == b"0"
    scanned = command("scan", out, "--policy", "weapons", "--format", "json")
    assert scanned.code == 0
    records = [json.loads(line) for line in scanned.out.splitlines()]
    assert [record["id"] for record in records] == [
        "cat/a.png", "cat/b.png", "cat/c.png", "dog/a.png", "dog/b.png",
    ]  # fmt: skip


def test_the_numbers_are_the_autoencoders(
    encode: Command, tiny: Autoencoder, photos: Path, tmp_path: Path
) -> None:
    from latentguard.encode.framing import Framing
    from latentguard.encode.pictures import open_picture

    out = tmp_path / "a.safetensors"
    assert encode(photos, "-o", out).code == 0
    found = load_latents(out)
    assert (found.space.name, found.scaled, len(found)) == ("flux2", True, 5)
    for one, name in zip(found, found.ids or (), strict=True):
        pixels, _ = Framing(32).apply(open_picture(photos / name))
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        torch.testing.assert_close(one.tensor, tiny.encode(images).tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_one_file(encode: Command, photos: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"a{suffix}"
    ran = encode(photos, "-o", out, "--labels", "folder", "--store", "float16")
    assert (ran.code, ran.out) == (0, f"{out}: latents of 5 pictures\n")
    found = load_latents(out)
    assert found.tensor.shape == (5, 32, 4, 4)
    assert found.tensor.dtype == torch.float16
    assert found.ids == ("cat/a.png", "cat/b.png", "cat/c.png", "dog/a.png", "dog/b.png")
    assert out.with_suffix(".labels.txt").read_text() == "0\n0\n0\n1\n1\n"
    assert out.with_suffix(".names.txt").read_text() == "cat\ndog\n"
    if suffix == ".safetensors":
        with safe_open(str(out), "pt") as file:
            assert json.loads(file.metadata()["captions"])[1] == "a cat on a chair"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_more_text_than_a_file_may_have(
    encode: Command, photos: Path, tmp_path: Path, suffix: str
) -> None:
    for number in range(9):
        (photos / f"{number}.png").write_bytes(photo_bytes(number))
        (photos / f"{number}.txt").write_text("x" * 2**20)
    out = tmp_path / f"a{suffix}"
    ran = encode(photos, "-o", out)
    assert (ran.code, "one file cannot be read again" in ran.err) == (2, True)
    assert not out.exists()
    assert encode(photos, "-o", tmp_path / "out").code == 0
    assert len([r for r in read_latents([tmp_path / "out"]) if r.latents]) == 14


def test_numbers_alone(encode: Command, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.npy"
    assert encode(photos, "-o", out).code == 0
    assert np.load(out).shape == (5, 32, 4, 4)
    said = json.loads(out.with_suffix(".json").read_text())
    assert (said["space"], said["scaled"], said["ids"][0]) == ("flux2", True, "cat/a.png")
    ran = encode(photos, "-o", out, "--store", "bfloat16")
    assert (ran.code, "has no bfloat16" in ran.err) == (2, True)


def test_bfloat16_in_shards(encode: Command, photos: Path, tmp_path: Path) -> None:
    assert encode(photos, "-o", tmp_path / "out", "--store", "bfloat16").code == 0
    records = list(read_latents([tmp_path / "out"]))
    assert len(records) == 5
    assert {r.latents.tensor.dtype for r in records if r.latents} == {torch.bfloat16}


def test_shapes_of_their_own(encode: Command, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert encode(photos, "-o", out, "--crop", "none", "--batch-size", 2).code == 0
    records = list(read_latents([out]))
    assert [r.id for r in records][:2] == ["cat/a.png", "cat/b.png"]
    # 40 x 56 becomes 32 x 44.8, of which 32 x 32 are multiples of 16.
    sizes = [(r.latents.width, r.latents.height) for r in records if r.latents]
    assert sizes == [(4, 4), (4, 4), (4, 4), (4, 4), (4, 4)]
    (photos / "wide.png").write_bytes(photo_bytes(9, (128, 40)))
    ran = encode(photos, "-o", tmp_path / "a.pt", "--crop", "none")
    assert (ran.code, "one array holds latents of one size" in ran.err) == (2, True)


def test_shards_and_datasets_are_sources(encode: Command, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    source = tmp_path / "in"
    source.mkdir()
    write_tar(
        source / "a.tar",
        {"0.png": photo_bytes(), "0.cls": b"7", "0.json": b'{"url": "x", "scaled": false}'},
    )
    save_to_disk(source / "data", rows(3))
    out = tmp_path / "out"
    assert encode(source, "-o", out).code == 0
    assert [r.id for r in read_latents([out])] == ["0", "0.png", "1.png", "2.png"]
    said = json.loads(read_tar(out / "000000-0000.tar")["000000-0000-000000.json"])
    # What the source says of itself is kept, and says nothing about the latents.
    assert (said["source"], said["scaled"]) == ({"url": "x", "scaled": False}, True)
    assert read_tar(out / "000001-0000.tar")["000001-0000-000000.txt"] == b"caption 0"
    # Shards of latents are shards of no pictures.
    ran = encode(out, "-o", tmp_path / "again.pt")
    assert (ran.code, "no picture could be encoded" in ran.err) == (2, True)


# -- what is wrong ---------------------------------------------------------------------------


def test_broken_pictures_are_listed_and_skipped(
    encode: Command, photos: Path, tmp_path: Path
) -> None:
    (photos / "cat" / "b.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    ran = encode(photos, "-o", out)
    assert (ran.code, ran.out) == (3, f"{out}: latents of 4 pictures in 1 shard\n")
    assert f"1 picture could not be encoded (see {out}/problems.jsonl); the first: " in ran.err
    (line,) = (out / "problems.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": str(photos / "cat" / "b.png"),
        "id": "cat/b.png",
        "error": "is not a picture in a known format (JPEG, PNG, WEBP, BMP, GIF)",
    }
    assert [r.id for r in read_latents([out])][:2] == ["cat/a.png", "cat/c.png"]
    # A run that is gone on with still knows them.
    assert encode(photos, "-o", out, "--resume").code == 3
    ran = encode(photos, "-o", tmp_path / "strict", "--strict")
    assert (ran.code, "b.png: is not a picture in a known format" in ran.err) == (2, True)
    assert not list((tmp_path / "strict").glob("*.tar"))


def test_all_pictures_are_broken(encode: Command, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(b"no picture")
    ran = encode(source, "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (3, f"{tmp_path / 'out'}: latents of 0 pictures in 0 shards\n")
    ran = encode(source, "-o", tmp_path / "a.pt")
    assert (ran.code, "no picture could be encoded" in ran.err) == (2, True)
    assert not (tmp_path / "a.pt").exists()


def test_latents_that_are_not_finite_are_a_problem(tiny: Autoencoder, photos: Path) -> None:
    from latentguard.encode.distribution import Distribution

    def overflowing(images: torch.Tensor) -> Distribution:
        cells = torch.ones(len(images), 32, images.shape[2] // 8, images.shape[3] // 8)
        return Distribution(cells * (images.mean((1, 2, 3)) - 0.5).view(-1, 1, 1, 1) * torch.inf)

    broken = Autoencoder(overflowing, "broken", tiny.space, scaled=True, sha256="x")
    with pytest.raises(LatentsError, match="its latents are not finite in float32"):
        encode_pictures([photos], broken, cache=photos / "cache", size=32)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "a.pt", "--task", "1/2"], "--task and --resume work on folders"),
        (["-o", "a.tar"], "a folder of shards has no ending"),
        (["-o", "out", "--task", "3/2"], "--task must be K/N with K from 1 to N"),
        (["-o", "out", "--crop", "none", "--labels", "folder", "missing"], "no such file"),
        (["-o", "out", "--mode", "sample"], "no distribution"),
        (["-o", "out", "--space", "sdxl"], "32 channels, those of space sdxl have 4"),
    ],
)
def test_options_that_cannot_be(
    encode: Command, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(photos.parent)
    ran = encode(photos, *arguments)
    assert ran.code == 2
    assert says in ran.err
    assert "\n" not in ran.err.strip()


# -- runs ------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(
    encode: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert encode(photos, "-o", whole, "--shard-size", 2).code == 0
    real = Encoding._batch
    calls = 0

    def dies(self: Encoding, frames: list[Any]) -> list[Any]:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the second shard
            raise ModelError("the power failed")
        return real(self, frames)

    monkeypatch.setattr(Encoding, "_batch", dies)
    assert encode(photos, "-o", out, "--shard-size", 2).code == 2
    monkeypatch.undo()
    # A shard is there whole or not at all, and nothing half-written lies beside it.
    assert sorted(path.name for path in out.iterdir()) == [
        "000000-0000.tar", "encode.json", "pictures-1.jsonl",
    ]  # fmt: skip
    before = (out / "000000-0000.tar").stat().st_mtime_ns
    with (out / "pictures-1.jsonl").open("a") as log:
        log.write('{"unit": 1, "par')  # of a line that was being written
    (out / f".{'0' * 32}.part").write_bytes(b"a shard that was being written")
    ran = encode(photos, "-o", out, "--shard-size", 2)
    assert (ran.code, "already holds this run: --resume continues it" in ran.err) == (2, True)
    ran = encode(photos, "-o", out, "--shard-size", 2, "--resume")
    assert (ran.code, ran.out) == (0, f"{out}: latents of 5 pictures in 3 shards\n")
    assert (out / "000000-0000.tar").stat().st_mtime_ns == before
    assert not list(out.glob(".*.part"))
    assert contents(out) == contents(whole)
    # A shard that has gone is made again.
    (out / "000002-0000.tar").unlink()
    assert encode(photos, "-o", out, "--shard-size", 2, "--resume").code == 0
    assert contents(out) == contents(whole)


def test_another_run_is_not_gone_on_with(encode: Command, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert encode(photos, "-o", out).code == 0
    ran = encode(photos, "-o", out, "--resume", "--crop", "resize")
    assert (ran.code, "crop is 'center', but this run has 'resize'" in ran.err) == (2, True)
    (photos / "new.png").write_bytes(photo_bytes())
    ran = encode(photos, "-o", out, "--resume")
    assert (ran.code, "encode.json: sources is" in ran.err) == (2, True)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(out / "000000-0000.tar", other / "precious.tar")
    ran = encode(photos, "-o", other)
    assert (ran.code, "holds shards of something else" in ran.err) == (2, True)


def test_tasks_share_the_work(encode: Command, photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(photos, source / "photos")
    write_tar(source / "big.tar", {f"{n}.png": photo_bytes(n) for n in range(7)})
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert encode(source, "-o", whole, "--shard-size", 2).code == 0
    counts = []
    for number in (1, 2, 3):
        assert encode(source, "-o", out, "--shard-size", 2, "--task", f"{number}/3").code == 0
        counts.append(len(contents(out)))
    assert counts == [3, 5, 7]
    assert contents(out) == contents(whole)
    assert all(
        sum(Task(n, 3).has(u, p) for n in (1, 2, 3)) == 1 for u in range(5) for p in range(5)
    )


def test_the_same_pictures_give_the_same_bytes(
    encode: Command, photos: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        assert encode(photos, "-o", tmp_path / name).code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_batches_do_not_matter_beyond_rounding(
    encode: Command, photos: Path, tmp_path: Path
) -> None:
    found = []
    for size in (1, 2, 5):
        out = tmp_path / f"{size}.pt"
        assert encode(photos, "-o", out, "--batch-size", size).code == 0
        found.append(load_latents(out).tensor)
    for other in found[1:]:
        # Measured 1e-6 at most, of latents that deviate by 0.3.
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=1e-4)


# -- a cache ---------------------------------------------------------------------------------


def test_a_cache_spares_the_autoencoder(
    encode: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert encode(photos, "-o", tmp_path / "a.pt", "--cache", cache).code == 0
    monkeypatch.setattr(Encoding, "_batch", None)
    (photos / "cat" / "a.png").rename(photos / "cat" / "renamed.png")
    assert encode(photos, "-o", tmp_path / "b.pt", "--cache", cache).code == 0
    first, second = load_latents(tmp_path / "a.pt"), load_latents(tmp_path / "b.pt")
    assert second.ids == ("cat/b.png", "cat/c.png", "cat/renamed.png", "dog/a.png", "dog/b.png")
    assert (second.tensor[2] == first.tensor[0]).all()
    with pytest.raises(TypeError):  # another crop is not there
        encode(photos, "-o", tmp_path / "c.pt", "--cache", cache, "--crop", "resize")


def test_pictures_for_other_commands(tiny_file: Path, photos: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    found = encode_pictures(
        [photos],
        tiny_file,
        cache=tmp_path / "cache",
        size=32,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (5, 5)
    assert [one.id for one in found][:2] == ["cat/a.png", "cat/b.png"]
    latents = found.latents()
    assert latents.ids == tuple(one.id for one in found)
    assert latents.tensor.shape == (5, 32, 4, 4)
    # Each file is one that every command reads.
    records = list(read_latents(found.files))
    assert all(r.latents is not None and r.latents.space.name == "flux2" for r in records)
    (photos / "cat" / "a.png").write_bytes(b"no picture")
    with pytest.raises(LatentsError, match=r"a\.png: is not a picture"):
        encode_pictures([photos], tiny_file, cache=tmp_path / "cache", size=32)
    found = encode_pictures([photos], tiny_file, cache=tmp_path / "cache", size=32, strict=False)
    assert (len(found), [problem.id for problem in found.problems]) == (4, ["cat/a.png"])


def test_a_damaged_file_of_a_cache_is_made_again(
    tiny_file: Path, photos: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"cache": tmp_path / "cache", "size": 32}
    found = encode_pictures([photos], tiny_file, **arguments)
    before = found.latents().tensor
    found.files[0].write_bytes(b"cut off")
    again = encode_pictures([photos], tiny_file, **arguments).latents().tensor
    torch.testing.assert_close(again, before, atol=2e-5, rtol=1e-4)


def test_draws_depend_on_the_picture_and_the_seed_alone(photos: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    )
    vae.save_pretrained(tmp_path / "vae")

    def drawn(seed: int, batch_size: int, cache: str, paths: list[Path]) -> torch.Tensor:
        return (
            encode_pictures(
                paths, tmp_path / "vae", cache=tmp_path / cache, size=32, mode="sample",
                seed=seed, batch_size=batch_size,
            )
            .latents()
            .tensor
        )  # fmt: skip

    all_of_them = drawn(0, 5, "a", [photos])
    torch.testing.assert_close(drawn(0, 1, "b", [photos]), all_of_them, atol=1e-4, rtol=1e-4)
    dogs = drawn(0, 3, "c", [photos / "dog"])
    torch.testing.assert_close(dogs, all_of_them[3:], atol=1e-4, rtol=1e-4)
    assert (drawn(1, 5, "a", [photos]) - all_of_them).abs().max() > 0.01


# -- pictures where commands take latents ----------------------------------------------------


def test_commands_that_take_latents_take_pictures(
    command: Command, tiny_file: Path, photos: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "mine.yaml"
    policy.write_text(
        'schema_version: 1\nname: mine\nversion: "1"\nconcepts:\n'
        "  - {id: guns, category: weapons, prompts: [revolver], threshold: {fpr: 0.5}, "
        "action: block}\n"
    )
    latents = tmp_path / "latents"
    options = ["--autoencoder", tiny_file, "--size", 64, "--encoded", latents]
    ran = command("calibrate", photos, "--policy", policy, *options)
    assert (ran.code, "0 %" in ran.err) == (0, False), ran.err
    assert len(list(latents.rglob("*.safetensors"))) == 5
    again = command("calibrate", latents, "--policy", policy, "--dry-run")
    assert again.out.splitlines()[1:6] == ran.out.splitlines()[1:6]
    ran = command(
        "evaluate", "detect", "--positives", photos / "cat", "--negatives", photos / "dog",
        "--policy", "weapons", "--concept", "handguns", "--resamples", 0, "--format", "json",
        *options,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert '"positives": 3' in json.dumps(found)
    ran = command("calibrate", photos, "--policy", policy, "--size", 64)
    assert (ran.code, "give --autoencoder, too" in ran.err) == (2, True)
    record = tmp_path / "log.jsonl"
    ran = command("calibrate", "--trajectories", record, "--policy", policy, *options)
    assert (ran.code, "about pictures, not records" in ran.err) == (2, True)
