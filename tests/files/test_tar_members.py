"""Shards whose headers readers read differently: as tarfile reads them, or an error.

Every shard here holds a member that tarfile hands out; the test says whether it is read, or named.
"""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import pytest
from files_helpers import flux2_batch, npy_bytes, read_all

from latentguard.files.bounds import MAX_SHARD_GAPS, MAX_SHARD_SAMPLE, MIB
from latentguard.files.tar import Member, read_members

SAYS = {"space": "flux2", "scaled": True}
NUMBERS = npy_bytes(flux2_batch(1, 4).numpy())
END = bytes(1024)


def member(name: str, body: bytes = NUMBERS, kind: bytes = b"0", size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(body) if size is None else size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def pax(*records: tuple[str, str], kind: bytes = b"x", padding: bytes = b"") -> bytes:
    body = b""
    for key, value in records:
        rest = len(f"{key}={value}\n".encode()) + 1
        size = rest + len(str(rest))
        body += f"{rest + len(str(size))} {key}={value}\n".encode()
    header = member("x", b"", kind, len(body))
    return header + body + padding + bytes(-len(body + padding) % 512)


def long_name(name: str, kind: bytes = b"L") -> bytes:
    return member("././@LongLink", name.encode() + b"\0", kind)


def outcomes(path: Path, data: bytes) -> tuple[list[str], list[str]]:
    """Ids that are read, and errors."""
    path.write_bytes(data)
    records = read_all(path, **SAYS)
    ids = [record.id or "" for record in records if record.error is None]
    return ids, [record.error for record in records if record.error is not None]


def names_of_tarfile(path: Path) -> list[str]:
    names = []
    for mode in ("r", "r|*"):
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            names.append([m.name.rstrip("/") for m in archive if m.isreg()])
    assert names[0] == names[1]
    return names[0]


READ = {
    "a name of 520 characters": pax(("path", "b" * 520 + ".latent.npy")) + member("x"),
    "a GNU name of 520 characters": long_name("d/" * 260 + "b.latent.npy") + member("x"),
    "a slash after a pax name": pax(("path", "b.latent.npy/")) + member("x"),
    "a slash after a name": member("b.latent.npy/"),
    "a long name before a pax header": (
        long_name("b.latent.npy") + pax(("mtime", "1")) + member("x")
    ),
    "a long name and an equal pax name": (
        long_name("b.latent.npy") + pax(("path", "b.latent.npy")) + member("x")
    ),
    "a comment for all members": pax(("comment", "1f3a"), kind=b"g") + member("b.latent.npy"),
    "a pax size": pax(("size", str(len(NUMBERS)))) + member("b.latent.npy"),
    "a size in the pax header alone": (
        pax(("size", str(len(NUMBERS)))) + member("b.latent.npy", b"", size=0) + NUMBERS
        + bytes(-len(NUMBERS) % 512)
    ),
    "a contiguous file": member("b.latent.npy", kind=b"7"),
    "a file of the oldest kind": member("b.latent.npy", kind=b"\0"),
    "a pax header of Solaris": pax(("path", "b.latent.npy"), kind=b"X") + member("x"),
    "an encoding": pax(("hdrcharset", "BINARY"), ("path", "b.latent.npy")) + member("x"),
}  # fmt: skip


@pytest.mark.parametrize("data", READ.values(), ids=READ.keys())
def test_what_is_read_as_tarfile_reads_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar"
    ids, errors = outcomes(path, member("a.latent.npy") + data + member("c.latent.npy") + END)
    assert errors == []
    expected = [name.removesuffix(".latent.npy") for name in names_of_tarfile(path)]
    assert len(expected) == 3
    # Ids are cut where they are shown.
    assert [i.removesuffix("...") for i in ids] == [name[:500] for name in expected]


HIDDEN = member("b.latent.npy")
REFUSED = {
    "a device with a size": (member("dev", b"", b"3", len(HIDDEN)) + HIDDEN, "dev is a device"),
    "a FIFO with a size": (member("f", b"", b"6", len(HIDDEN)) + HIDDEN, "f is a FIFO, but"),
    "a link with a size": (member("l", b"", b"1", len(HIDDEN)) + HIDDEN, "l is a link, but"),
    "a folder with a size": (member("d", b"", b"5", len(HIDDEN)) + HIDDEN, "d is a folder, but"),
    "a folder of the oldest kind": (
        member("d/", b"", b"\0", len(HIDDEN)) + HIDDEN,
        "d is a folder, but its header states",
    ),
    "a name for all members": (
        pax(("path", "b.latent.npy"), kind=b"g") + member("x.txt"),
        "has a global header that gives a name or size",
    ),
    "a size for all members": (
        pax(("size", "0"), kind=b"g") + member("x.txt", HIDDEN),
        "has a global header that gives a name or size",
    ),
    "a sparse map for all members": (
        pax(("GNU.sparse.name", "b.latent.npy"), kind=b"g") + member("x.txt"),
        "has a global header that",
    ),
    "two names": (
        pax(("path", "b.latent.npy")) + long_name("README.txt") + member("x.txt"),
        "b.latent.npy is given several names",
    ),
    "two names the other way round": (
        long_name("b.latent.npy") + pax(("path", "README.txt")) + member("x.txt"),
        "is given several names",
    ),
    "two sizes": (
        pax(("size", "5")) + pax(("size", "6")) + member("x.txt", HIDDEN),
        "is given several sizes",
    ),
    "a size of another kind": (
        pax(("size", "1_0")) + member("b.latent.npy"), "b.latent.npy is given a size that is"
    ),
    "a name with a NUL": (
        pax(("path", "b.latent.npy\0.txt")) + member("x.txt"), "or one with a NUL"
    ),
    "an empty name": (pax(("path", "")) + member("b.latent.npy"), "is given an empty name"),
    "a sparse name": (
        pax(("GNU.sparse.name", "b.latent.npy")) + member("x.txt"), "x.txt is a sparse member"
    ),
    "a sparse member": (member("b.latent.npy", kind=b"S"), "b.latent.npy is a sparse member"),
    "a type that nobody knows": (member("b.latent.npy", kind=b"Z"), "is not a regular file"),
    "a record in the padding": (
        pax(("mtime", "1"), padding=b"21 path=b.latent.npy\n") + member("x.txt"),
        "x.txt has an extension header with more data after its end",
    ),
    "a name behind a NUL": (
        member("././@LongLink", b"x.txt\0b.latent.npy\0", b"L") + member("b.latent.npy"),
        "x.txt has a damaged extension header",
    ),
    "an extension header of nothing": (pax(("path", "b.latent.npy")), "without a member after it"),
    "two files that say what a key is": (
        member("b.json", b"{}") + member("b.json", b"{}") + member("b.latent.npy"),
        "b.json occurs more than once",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_readers_read_differently_is_an_error(
    tmp_path: Path, data: bytes, message: str
) -> None:
    ids, errors = outcomes(tmp_path / "a.tar", member("a.latent.npy") + data + END)
    assert ids[0] == "a"
    assert any(message in error for error in errors), errors


def test_members_behind_a_refused_one_are_read(tmp_path: Path) -> None:
    for name, (data, _) in REFUSED.items():
        if name in ("an extension header of nothing", "two sizes"):
            continue
        ids, _ = outcomes(tmp_path / "a.tar", data + member("c.latent.npy") + END)
        assert ids[-1] == "c", name


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08\x04", b"BZh91AY&SY", b"\xfd7zXZ\0"])
def test_an_archive_that_begins_as_a_compressed_file(tmp_path: Path, start: bytes) -> None:
    """Where it can seek, tarfile reads its members; as a stream, what is compressed in it."""
    header = bytearray(member("x" * 20 + ".latent.npy"))
    header[: len(start)] = start
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    ids, errors = outcomes(tmp_path / "a.tar", bytes(header) + END)
    assert (ids, errors) == ([], ["is not a tar archive (a compressed one must be unpacked first)"])


def test_names_that_are_not_text_are_not_confused(tmp_path: Path) -> None:
    """Two names that look alike in a report are two keys."""
    says = b'{"space": "sdxl"}'
    data = bytearray(member("?.json", says) + member("?.latent.npy"))
    for at, byte in ((0, 0xFE), (1024, 0xFF)):
        data[at] = byte
        block = data[at : at + 512]
        data[at + 148 : at + 156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    ids, errors = outcomes(tmp_path / "a.tar", bytes(data) + END)
    assert (ids, errors) == (["?"], [])


def test_checksums_of_signed_characters(tmp_path: Path) -> None:
    data = bytearray(member("\u00e9.latent.npy"))
    high = sum(byte > 127 for byte in data[:512])
    total = sum(data[:148]) + 8 * 32 + sum(data[156:512]) - 256 * high
    data[148:156] = b"%06o\0 " % total
    ids, errors = outcomes(tmp_path / "a.tar", bytes(data) + END)
    assert (ids, errors) == (["\u00e9"], [])


def test_an_old_sparse_member_with_a_long_map_does_not_hide_the_next(tmp_path: Path) -> None:
    header = bytearray(member("s.jpg", b"", b"S", 512))
    header[482] = 1
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    extended = bytes(504) + b"\1" + bytes(7)
    data = bytes(header) + extended + bytes(512) + member("c.latent.npy")[:512] + HIDDEN
    ids, errors = outcomes(tmp_path / "a.tar", data + END)
    assert (ids, errors) == (["b"], ["s.jpg is a sparse member, which is not read"])


# -- cost ------------------------------------------------------------------------------------


def seconds(path: Path) -> float:
    begun = time.process_time()
    read_all(path, **SAYS)
    return time.process_time() - begun


def test_an_extension_header_costs_what_its_length_says(tmp_path: Path) -> None:
    """A mebibyte of records of six bytes: 0.2 seconds, where each copied all behind it 9."""
    body = b"6 a=b\n" * (MIB // 6)
    path = tmp_path / "a.tar"
    path.write_bytes(member("x", body, b"x") + member("a.latent.npy") + END)
    assert seconds(path) < 3


def test_zeros_behind_the_end_are_walked_to_a_bound(tmp_path: Path) -> None:
    """A terabyte of nothing: 0.1 seconds of a core, where each GiB took 9."""
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.latent.npy") + END)
    size = path.stat().st_size
    os.truncate(path, 2**40)
    assert seconds(path) < 3
    assert read_all(path, **SAYS)[-1].error == (
        f"has over {MAX_SHARD_GAPS // MIB} MiB of empty or damaged blocks: what follows byte "
        f"{size - 1024 + MAX_SHARD_GAPS} is not read"
    )
    os.truncate(path, 2**25)
    with path.open("ab") as file:
        file.write(member("b.latent.npy") + END)
    assert [record.id for record in read_all(path, **SAYS)] == ["a", "b"]


def test_damage_is_searched_to_a_bound() -> None:
    """Blocks that look like headers and are none: 4 microseconds each."""
    block = bytearray(b"\xff" * 512)
    block[257:262] = b"ustar"
    data = member("a") + bytes(block) * (8 * MIB // 512) + member("b") + END
    begun = time.process_time()
    items = list(read_members(io.BytesIO(data), len(data)))
    assert time.process_time() - begun < 2
    assert [item.name for item in items if isinstance(item, Member)] == ["a", "b"]
    assert len(items) == 3


def test_one_key_holds_no_end_of_latents(tmp_path: Path) -> None:
    data = member("a.latent.npy", b"") * (MAX_SHARD_SAMPLE + 2)
    ids, errors = outcomes(tmp_path / "a.tar", data + END)
    assert ids == []
    assert sum("is not read: its key has over" in error for error in errors) == 2
