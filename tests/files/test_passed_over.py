"""What is not read is an error where it could hold latents, and counted where it cannot."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_helpers import flux2_batch, npy_bytes, read_all, torch_bytes, write_tar
from safetensors.torch import save

from latentguard.files import ArrayRecord, PassedOver, read_arrays
from latentguard.files import paths as paths_module
from latentguard.files.passed_over import suffix_of

SAYS: dict[str, Any] = {"space": "flux2", "scaled": True}
NUMBERS = npy_bytes(flux2_batch(1, 4).numpy())
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(60)


def read(*paths: Path | str) -> tuple[list[ArrayRecord], PassedOver]:
    passed = PassedOver()
    return list(read_arrays(paths, **SAYS, passed=passed)), passed


def places(records: list[ArrayRecord], folder: Path) -> list[str]:
    """Sources of what was read, and with a sign before them of what was not."""
    return [
        ("" if record.error is None else "! ") + os.path.relpath(record.source, folder)
        for record in records
    ]


def write(folder: Path, *names: str, data: bytes = NUMBERS) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# -- members of shards -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("001.latents.npy", NUMBERS),
        ("001.npy", NUMBERS),
        ("001.vae_latent.pt", torch_bytes(flux2_batch(1))),
        ("001.latent.npy.gz", gzip.compress(NUMBERS, mtime=0)),
        ("001.latent.npy ", NUMBERS),
        ("001.LATENT", b"x"),
        ("001.latent.npy.json", NUMBERS),
        ("000.json", NUMBERS),
        ("001.txt", NUMBERS),
        ("001.pickle", b"x"),
        ("001.tar", b"x"),
        ("001", NUMBERS),
        ("001.latent.npy.bak", NUMBERS),
        ("001.latent.npy/x", NUMBERS),
        ("._001.latent.npy.x", NUMBERS),
        ("001.unheard-of", torch_bytes(flux2_batch(1))),
    ],
)
def test_a_sample_of_another_name_is_reported(tmp_path: Path, name: str, data: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"000.latent.npy": NUMBERS, name: data})
    first, last = read_all(path, **SAYS)
    assert (first.id, first.error) == ("000", None)
    assert last.error is not None
    assert f"1 member that could hold latents is not read ({name})" in last.error
    assert "name latents in a shard KEY.latent.pt" in last.error


def test_many_samples_of_another_name_are_one_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n:03}.npy": NUMBERS for n in range(200)})
    (record,) = read_all(path, **SAYS)
    assert record.error is not None
    assert "200 members that could hold latents are not read (000.npy, 001.npy, 002.npy, ...)" in (
        record.error
    )


def test_members_that_hold_no_latents_are_counted(tmp_path: Path) -> None:
    names = ["000.jpg", "000.cls", "000.txt", "000.caption", "001.JPG", "notes", "a.b\x1b[31m"]
    members = dict.fromkeys(names, b"text")
    members |= {"._000.latent.npy": APPLE_DOUBLE, "000.json": b"{}", "000.latent.npy": NUMBERS}
    records, passed = read(write_tar(tmp_path / "a.tar", members))
    assert [record.error for record in records] == [None]
    assert passed.members == {
        ".jpg": 2, ".cls": 1, ".txt": 1, ".caption": 1, "no suffix": 1, "other": 1, "._*": 1,
    }  # fmt: skip
    assert passed.line().startswith(
        "passed over, because they are not latents: 8 shard members (.jpg 2, "
    )


def test_numbers_behind_the_name_of_a_mac_file_are_read(tmp_path: Path) -> None:
    (record,) = read_all(write_tar(tmp_path / "a.tar", {"._000.latent.npy": NUMBERS}), **SAYS)
    assert (record.id, record.error) == ("._000", None)


# -- files of folders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.latents", b"x"),
        ("a.ckpt", b"x"),
        ("a.bin", b"x"),
        ("a.pkl", b"x"),
        ("a.h5", b"x"),
        ("a.arrow", b"x"),
        ("a.pt.gz", b"x"),
        ("a.zip", b"x"),
        ("a.pt.", b"x"),
        (".hidden.PICKLE", b"x"),
        (".zarray", b"x"),
        ("model", torch_bytes(flux2_batch(1))),
        ("numbers", NUMBERS),
        ("numbers.npy.old", NUMBERS),
        ("tensors", b"\x10\0\0\0\0\0\0\0{}              "),
        ("packed.gz", gzip.compress(b"x", mtime=0)),
        ("dump", b"\x80\x04N."),
        ("._numbers", NUMBERS),
    ],
)
def test_a_file_that_could_hold_latents_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    write(tmp_path, "good.npy")
    write(tmp_path, name, data=data)
    records, passed = read(tmp_path)
    assert sorted(places(records, tmp_path)) == sorted([f"! {name}", "good.npy"])
    (error,) = (record.error for record in records if record.error)
    assert error.startswith("could hold latents, but its type cannot be read: known are .pt")
    assert passed.line() == ""


def test_other_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "a/good.NPY")
    write(tmp_path, "a/x.json", "a/y.json", "a/b/z.TXT", "readme", ".env", "t.json.gz", data=b"{}")
    write(tmp_path, "a/._good.NPY", data=APPLE_DOUBLE)
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere.png", tmp_path / "gone.png")
    records, passed = read(tmp_path)
    assert places(records, tmp_path) == ["a/good.NPY"]
    assert passed.files == {
        ".json": 3, ".txt": 1, "no suffix": 2, ".env": 1, ".png": 1, "._*": 1,
    }  # fmt: skip
    assert passed.line().startswith(
        "passed over, because they are not latents: 9 files (.json 3, no suffix 2, "
    )


def tar_header(name: bytes, magic: bytes = b"ustar\x0000") -> bytes:
    """A .tar of one empty member of any name; writers of before 1988 wrote no magic."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[:100] = name.ljust(100, b"\0")
    block[257:265] = magic.ljust(8, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_a_shard_that_begins_as_what_a_mac_leaves_behind(tmp_path: Path) -> None:
    """Its first member's name is such a beginning, so tarfile reads it."""
    shard = write_tar(tmp_path / "a.tar", {"0.latent.npy": NUMBERS}).read_bytes()
    (tmp_path / "a.tar").unlink()
    write(tmp_path, "good.npy")
    write(tmp_path, "._a.tar", data=tar_header(APPLE_DOUBLE) + shard)
    write(tmp_path, "._b.tar", data=APPLE_DOUBLE.ljust(600, b"\0"))
    records, passed = read(tmp_path)
    assert places(records, tmp_path) == ["._a.tar::0.latent.npy", "good.npy"]
    assert passed.files == {"._*": 1}


def test_a_shard_of_unknown_suffix_without_a_magic(tmp_path: Path) -> None:
    write(tmp_path, "good.npy")
    write(tmp_path, "a.shard", data=tar_header(b"0.latent.npy", b""))
    records, _ = read(tmp_path)
    assert places(records, tmp_path) == ["! a.shard", "good.npy"]


@pytest.mark.parametrize("name", ["a.txt", "a.latent.pt.json", "a.jpg", "a.cls"])
@pytest.mark.parametrize("kind", ["npy", "pt", "tar", "safetensors"])
def test_numbers_under_the_name_of_a_text_or_picture(tmp_path: Path, name: str, kind: str) -> None:
    data = {
        "npy": NUMBERS,
        "pt": torch_bytes(flux2_batch(1)),
        "tar": tar_header(b"x"),
        "safetensors": save({"latents": flux2_batch(1)}),
    }[kind]
    write(tmp_path, "good.npy")
    write(tmp_path, name, data=data)
    records, _ = read(tmp_path)
    assert sorted(places(records, tmp_path)) == [f"! {name}", "good.npy"]


def test_harmless_contents_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "good.npy")
    write(tmp_path, "a.docx", data=b"PK\x03\x04")
    write(tmp_path, "a.md", data=b"GGUF is a format, ARROW1 is another")
    write(tmp_path, "a.txt.gz", data=gzip.compress(b"text"))
    records, passed = read(tmp_path)
    assert places(records, tmp_path) == ["good.npy"]
    assert passed.files == {".docx": 1, ".md": 1, ".txt": 1}


def test_a_million_suffixes_are_few_counts() -> None:
    passed = PassedOver()
    for number in range(1000):
        passed.add_file(f"a.x{number}")
    assert passed.files.total() == 1000
    assert len(passed.files) < 50


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.PT", ".pt"), ("a.pt.gz", ".pt"), ("a.pt.gz.xz", ".pt"), ("d.pt/a", ""), ("a", ""),
        ("a.npy. ", ".npy"), (".npy", ".npy"), (".gz", ""), ("", ""),
    ],
)  # fmt: skip
def test_suffixes(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


def test_what_cannot_be_listed_or_opened_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a/x.npy", "b/y.npy", "c/z.npy")
    scandir, listdir = os.scandir, os.listdir

    def refusing(path: Any) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def refusing_list(path: Any) -> Any:
        refusing(path).close()
        return listdir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(os, "listdir", refusing_list)
    for pattern in (tmp_path, f"{tmp_path}/**/*.npy", f"{tmp_path}/*/*.npy"):
        records, _ = read(pattern)
        assert sorted(places(records, tmp_path)) == ["! b", "a/x.npy", "c/z.npy"]
        (error,) = (record.error for record in records if record.error)
        assert error == "is a folder that cannot be listed: Permission denied"

    def unopened(path: Path) -> io.BytesIO:
        raise paths_module.LatentsError("cannot be opened: Permission denied")

    monkeypatch.setattr(paths_module, "open_regular", unopened)
    write(tmp_path, "a/unknown")
    records, _ = read(tmp_path / "a")
    assert places(records, tmp_path) == ["! a/unknown", "a/x.npy"]


# -- links -----------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A run whose second part lies elsewhere, with a loop of links and a link to nothing."""
    write(tmp_path, "runs/part1/a.npy", "store/b.npy")
    os.symlink("../store", tmp_path / "runs/part2")
    os.symlink("..", tmp_path / "runs/part1/up")
    os.symlink("part1", tmp_path / "runs/latest")
    os.symlink("nowhere.pt", tmp_path / "runs/part1/dangling.pt")
    return tmp_path / "runs"


def test_linked_folders_are_read_once(linked: Path) -> None:
    records, passed = read(linked)
    assert places(records, linked) == ["! part1/dangling.pt", "part1/a.npy", "part2/b.npy"]
    assert "its link leads nowhere" in (records[0].error or "")
    assert passed.links == 2
    assert (
        passed.line()
        == "passed over, because they are not latents: 2 links to folders that are read"
    )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.npy", ["part1/a.npy", "part2/b.npy"]),
        ("**", ["! part1/dangling.pt", "part1/a.npy", "part2/b.npy"]),
        ("**/*", ["! part1/dangling.pt", "part1/a.npy", "part2/b.npy"]),
        ("*/*.npy", ["latest/a.npy", "part1/a.npy", "part2/b.npy"]),
        ("part*", ["! part1/dangling.pt", "part1/a.npy", "part2/b.npy"]),
        ("**/up/**/*.npy", ["part1/up/part1/a.npy", "part1/up/part2/b.npy"]),
        ("**/dangling.*", ["! part1/dangling.pt"]),
        ("[p]art1/?.npy", ["part1/a.npy"]),
    ],
)
def test_patterns_do_not_walk_a_loop(linked: Path, pattern: str, expected: list[str]) -> None:
    records, _ = read(f"{linked}/{pattern}")
    found = places(records, linked)
    assert sorted(set(found)) == sorted(found)
    assert sorted(found) == sorted(expected)


def test_patterns_of_the_folder_one_is_in(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(linked)
    for pattern in ("**/a.npy", "*/a.npy", "./**/a.npy"):
        records, _ = read(pattern)
        assert os.path.normpath(records[-1].source) == "part1/a.npy"
        assert all(record.error is None for record in records)


def test_a_link_to_nothing_may_have_been_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "a.npy")
    os.symlink("gone", tmp_path / "part2")
    os.symlink("self", tmp_path / "self")
    records, _ = read(tmp_path)
    assert places(records, tmp_path) == ["! part2", "! self", "a.npy"]


def test_the_folders_that_are_there_come_before_the_links(tmp_path: Path) -> None:
    """Sources keep the names that they have without the links."""
    write(tmp_path, "a/x.npy", "z/y.npy")
    os.symlink("../z", tmp_path / "a/link")
    records, _ = read(tmp_path)
    assert places(records, tmp_path) == ["a/x.npy", "z/y.npy"]


def test_files_read_by_pattern_are_whole_folders_too(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", flux2_batch(1, 4).numpy())
    write(tmp_path, "d/b.npy", "d/c.latent")
    records, _ = read(f"{tmp_path}/*")
    assert places(records, tmp_path) == ["a.npy", "d/b.npy", "! d/c.latent"]
    records, _ = read(f"{tmp_path}/*/")
    assert places(records, tmp_path) == ["d/b.npy", "! d/c.latent"]


def test_a_pattern_with_a_nul_matches_nothing(tmp_path: Path) -> None:
    (record,), _ = read(f"{tmp_path}/a\0b/*.npy")
    assert record.error == "matches no file"
