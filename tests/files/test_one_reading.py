"""What a format's own library would read otherwise is refused, never judged as another image."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_helpers import flux2_batch, npy_bytes, only_error, read_all, torch_bytes

from latentguard.files import read_arrays

SAYS: dict[str, Any] = {"space": "flux2", "scaled": True}


def packed(parts: dict[str, bytes]) -> bytes:
    """A zip archive as Python writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def torch_parts(value: Any) -> dict[str, bytes]:
    """The parts of torch.save's archive that every version writes."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes(value))) as archive:
        names = ("data.pkl", "byteorder", "version")
        kept = [n for n in archive.namelist() if n.partition("/")[2].startswith((*names, "data/"))]
        return {name: archive.read(name) for name in kept}


def end_of(data: bytes) -> list[int]:
    """The fields of the end record: count, length and start of the directory among them."""
    return list(struct.unpack("<4H2LH", data[-18:]))


def with_end(data: bytes, fields: list[int]) -> bytes:
    return data[:-18] + struct.pack("<4H2LH", *fields)


# -- .pt and .npz: archives ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_two_directories(tmp_path: Path, suffix: str) -> None:
    """Python's zipfile takes the last directory, torch the one that the end record points to."""
    path = tmp_path / f"a{suffix}"
    files = []
    for batch in (flux2_batch(1), -flux2_batch(1)):
        if suffix == ".pt":
            files.append(packed(torch_parts({"latents": batch, **SAYS})))
        else:
            files.append(packed({"latents.npy": npy_bytes(batch.numpy())}))
    first, second = files
    path.write_bytes(with_end(first[:-22] + second, end_of(first)))
    assert "readers differ on which one counts" in only_error(path, **SAYS)
    path.write_bytes(first + second)
    assert "readers differ on which one counts" in only_error(path, **SAYS)


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_bytes_that_no_part_owns(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        good = packed(torch_parts({"latents": flux2_batch(1), **SAYS}))
    else:
        good = packed({"latents.npy": npy_bytes(flux2_batch(1).numpy())})
    path.write_bytes(good)
    assert read_all(path, **SAYS)[0].error is None
    count, _, _, _, length, start, comment = end_of(good)
    for at in (0, good.index(b"PK\x03\x04", 4) if suffix == ".pt" else 0, start, start + length):
        for stated in (start, start + 8):
            moved = good[:at] + b"\0" * 8 + good[at:]
            path.write_bytes(
                with_end(moved, [count, 0, *end_of(good)[2:4], length, stated, comment])
            )
            assert only_error(path, **SAYS)
    path.write_bytes(good + b"\0")
    assert "is not a zip archive" in only_error(path, **SAYS)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (6, 0x2000),  # flags: a masked header
        (8, 8),  # method: deflated
        (22, 1),  # size once unpacked
        (26, 3),  # length of the name
        (30, 0x2F78),  # the name itself
    ],
)
def test_a_local_header_that_differs_from_the_directory(
    tmp_path: Path, offset: int, value: int
) -> None:
    data = bytearray(packed(torch_parts({"latents": flux2_batch(1), **SAYS})))
    struct.pack_into("<H", data, offset, value)
    (tmp_path / "a.pt").write_bytes(data)
    assert "is a damaged zip archive" in only_error(tmp_path / "a.pt")


def test_a_part_marked_as_a_folder_is_empty_to_torch(tmp_path: Path) -> None:
    data = bytearray(packed(torch_parts({"latents": flux2_batch(1), **SAYS})))
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    struct.pack_into("<L", data, entry + 38, 0x10)
    (tmp_path / "a.pt").write_bytes(data)
    assert "only files are expected" in only_error(tmp_path / "a.pt")


def test_overlapping_parts(tmp_path: Path) -> None:
    data = bytearray(packed(torch_parts({"latents": flux2_batch(1), **SAYS})))
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    struct.pack_into("<L", data, entry + 42, 0)
    (tmp_path / "a.pt").write_bytes(data)
    assert "is a damaged zip archive" in only_error(tmp_path / "a.pt")


def test_an_npz_behind_an_npy(tmp_path: Path) -> None:
    """numpy.load looks at the first bytes: it gives the array, and never sees the archive."""
    shown, hidden = flux2_batch(1).numpy(), -flux2_batch(1).numpy()
    front = npy_bytes(hidden)
    archive = packed({"latents.npy": npy_bytes(shown)})
    for suffix in (".npz", ".npy"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(front + archive)
        loaded = np.load(path)
        assert np.array_equal(loaded, hidden)
        assert only_error(path, **SAYS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("version", b"99\n", "of an unknown version"),
        ("version", b"x", "is not a number"),
        ("byteorder", b"LITTLE", "big-endian"),
        (".unknown", b"", "do not write"),
    ],
)
def test_parts_by_which_torch_decides_how_to_read(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    parts = torch_parts({"latents": flux2_batch(1), **SAYS})
    (tmp_path / "a.pt").write_bytes(packed({**parts, f"archive/{name}": content}))
    assert message in only_error(tmp_path / "a.pt")


def test_storages_that_are_not_where_torch_may_compute_them(tmp_path: Path) -> None:
    """torch.load can be told to compute where storages lie instead of reading it."""
    images = [flux2_batch(1), flux2_batch(1)]
    parts = torch_parts({"latents": images, **SAYS})
    (tmp_path / "a.pt").write_bytes(packed(parts))
    assert len(read_all(tmp_path / "a.pt")) == 2
    (tmp_path / "b.pt").write_bytes(packed({**parts, "archive/.format_version": b"1"}))
    assert "is not where torch.save puts it" in only_error(tmp_path / "b.pt")
    torch.save({"latents": [*images, flux2_batch(1, 10)], **SAYS}, tmp_path / "c.pt")
    assert [r.error for r in read_all(tmp_path / "c.pt")] == [None] * 3


# -- .pt: structures -------------------------------------------------------------------------


class Structure:
    """A data.pkl written opcode by opcode."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def tensor(
        self, kind: str, count: int, offset: int, shape: list[int], tail: bytes = b""
    ) -> bytes:
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text("0") + text("cpu")
            + number(count) + b"tQ" + number(offset)
            + b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides))
            + b"t\x89ccollections\nOrderedDict\n)R" + tail + b"tR"
        )  # fmt: skip

    def file(self, body: bytes) -> bytes:
        parts = {"a/data.pkl": b"\x80\x02" + body + b".", "a/version": b"3\n"}
        return packed({**parts, "a/data/0": self.blob})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


SHAPE = [1, 32, 2, 2]


def test_one_storage_of_two_types(tmp_path: Path) -> None:
    """torch gives a storage the type of its first mention: all later tensors are of that type."""
    shown, hidden = np.full(SHAPE, 0.5, np.float16), np.full(SHAPE, 0.25, np.float32)
    blob = bytes(256) + shown.tobytes() + hidden.tobytes()
    path, made = tmp_path / "a.pt", Structure(blob)
    thumbnail = made.tensor("Float", 256, 0, [1])
    latents = made.tensor("Half", 512, 128, SHAPE)
    path.write_bytes(
        made.file(b"}(" + text("thumbnail") + thumbnail + text("latents") + latents + b"u")
    )
    loaded = torch.load(path, weights_only=True)["latents"]
    assert np.array_equal(loaded.numpy(), hidden)
    assert "is mentioned with two types or lengths" in only_error(path, **SAYS)


@pytest.mark.parametrize("count", [127, 129, 64])
def test_a_storage_of_another_length_than_its_part(tmp_path: Path, count: int) -> None:
    made = Structure(bytes(512))
    (tmp_path / "a.pt").write_bytes(made.file(made.tensor("Float", count, 0, [1, 16, 2, 2])))
    assert "the archive holds 512" in only_error(tmp_path / "a.pt", space="sd3", scaled=True)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (b"}" + text("neg") + b"\x88s", "a tensor with flags"),
        (b"NN", "misused"),
    ],
)
def test_what_would_change_a_tensors_numbers(tmp_path: Path, tail: bytes, message: str) -> None:
    made = Structure(bytes(512))
    (tmp_path / "a.pt").write_bytes(made.file(made.tensor("Float", 128, 0, SHAPE, tail)))
    assert message in only_error(tmp_path / "a.pt", **SAYS)


def test_opcodes_that_reach_below_a_mark_and_keys_given_twice(tmp_path: Path) -> None:
    made = Structure(np.ones(SHAPE, np.float32).tobytes())
    path, tensor = tmp_path / "a.pt", made.tensor("Float", 128, 0, SHAPE)
    path.write_bytes(made.file(tensor))
    assert read_all(path, **SAYS)[0].error is None
    for body in (tensor + b"(\x85", tensor + b"(", b"N" + tensor, tensor + b"." + tensor):
        path.write_bytes(made.file(body))
        assert "damaged pickle" in only_error(path, **SAYS)
    path.write_bytes(made.file(b"}(" + (text("latents") + tensor) * 2 + b"u"))
    assert "holds 'latents' twice" in only_error(path, **SAYS)


# -- .npy and .safetensors -------------------------------------------------------------------


def test_npy_headers_that_versions_read_differently(tmp_path: Path) -> None:
    numbers = np.zeros(SHAPE, np.float32).tobytes()
    for version, shape, more in ((3, "(1L, 32L, 2L, 2L)", ""), (1, "(1, 32, 2, 2)", "# \u00e9")):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}{more}\n".encode()
        form = "<H" if version == 1 else "<L"
        start = b"\x93NUMPY" + bytes([version, 0]) + struct.pack(form, len(header)) + header
        (tmp_path / "a.npy").write_bytes(start + numbers)
        assert ".npy header" in only_error(tmp_path / "a.npy", **SAYS)


def safetensors_bytes(header: str | bytes, numbers: bytes) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + numbers


LATENTS = '"latents":{"dtype":"F32","shape":[1,32,2,2],"data_offsets":[0,512]}'


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (f"{{{LATENTS},{LATENTS.replace('0,512', '512,1024')}}}", 1024, "holds 'latents' twice"),
        (f'{{{LATENTS.replace("}", ",")}"shape":[1,32,2,2]}}}}', 512, "holds 'shape' twice"),
        (f"{{{LATENTS}}}", 520, "more data after its numbers"),
        (f"{{{LATENTS.replace('0,512', '8,520')}}}", 520, "begins at byte 8"),
        (
            f"{{{LATENTS},{LATENTS.replace('latents', 'x')}}}",
            512,
            "begins at byte 0, the one before",
        ),
        (f" {{{LATENTS}}}", 512, "not a JSON object"),
        (f"{{{LATENTS}}}".encode("utf-16"), 512, "is not JSON"),
        (f"{{{LATENTS.replace('[0,', '[-0,')}}}", 512, "is not a size"),
        (f"{{{LATENTS.replace('F32', 'F32X')}}}", 512, "must be F16, BF16, F32"),
        (f'{{"\\ud800":{LATENTS.partition(":")[2]}}}', 512, "damaged safetensors header"),
        (f'{{{LATENTS.replace("}", ",")}"more":1}}}}', 512, "damaged safetensors header"),
    ],
)
def test_safetensors_that_the_official_library_refuses_or_reads_otherwise(
    tmp_path: Path, header: str | bytes, size: int, message: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(size)))
    assert message in only_error(path, **SAYS)
    path.write_bytes(safetensors_bytes(f"{{{LATENTS}}}  ", bytes(512)))
    assert read_all(path, **SAYS)[0].error is None


# -- files that change -----------------------------------------------------------------------


def written(path: Path) -> Path:
    batch = flux2_batch(8, 64)
    if path.suffix == ".pt":
        torch.save({"latents": batch, **SAYS}, path)
    elif path.suffix == ".npz":
        np.savez(path, latents=batch.numpy(), **SAYS)
    elif path.suffix == ".npy":
        np.save(path, batch.numpy())
    else:
        header = {
            "latents": {
                "dtype": "F32",
                "shape": list(batch.shape),
                "data_offsets": [0, batch.nbytes],
            }
        }
        path.write_bytes(safetensors_bytes(json.dumps(header), batch.numpy().tobytes()))
    return path


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".npy", ".safetensors"])
@pytest.mark.parametrize("grows", [True, False])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, suffix: str, grows: bool) -> None:
    """A mapped file that shrinks ends the process; here it is that file's error alone."""
    first, second = written(tmp_path / f"a{suffix}"), written(tmp_path / f"b{suffix}")
    records = read_arrays([first, second], **SAYS)
    assert next(records).error is None
    with first.open("r+b") as stream:
        stream.truncate(first.stat().st_size + 1 if grows else 1000)
    rest = [record for record in records if record.source == str(first)]
    assert "changed while it was read" in (rest[-1].error or "")
    assert len(rest) < 8


def test_a_file_that_is_written_over_while_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt")
    records = read_arrays(path, **SAYS)
    assert next(records).error is None
    time.sleep(0.02)  # the times of a file have steps
    with path.open("r+b") as stream:
        stream.seek(-5000, io.SEEK_END)
        stream.write(bytes(1000))
    assert "changed while it was read" in (list(records)[-1].error or "")


def test_a_file_whose_time_is_set_back(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt")
    before = path.stat()
    records = read_arrays(path, **SAYS)
    assert next(records).error is None
    time.sleep(0.02)
    with path.open("r+b") as stream:
        stream.seek(-5000, io.SEEK_END)
        stream.write(bytes(1000))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "changed while it was read" in (list(records)[-1].error or "")


@pytest.mark.parametrize("by", ["file", "link", "folder"])
def test_another_file_in_its_place_while_it_is_read(tmp_path: Path, by: str) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "a.pt")
    os.symlink("one", tmp_path / "link")
    path = tmp_path / ("link" if by == "link" else "one") / "a.pt"
    records = read_arrays(path, **SAYS)
    assert next(records).error is None
    if by == "file":
        os.replace(tmp_path / "other" / "a.pt", path)
    elif by == "link":
        (tmp_path / "link").unlink()
        os.symlink("other", tmp_path / "link")
    else:
        os.rename(tmp_path / "one", tmp_path / "away")
        os.rename(tmp_path / "other", tmp_path / "one")
    assert "changed while it was read" in (list(records)[-1].error or "")


# -- cost ------------------------------------------------------------------------------------


def test_tensors_over_the_same_bytes_are_read_a_bounded_number_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentguard.files.torch_files.MIN_READING", 2**20)
    path, made = tmp_path / "a.pt", Structure(bytes(512))
    tensor = made.tensor("Float", 128, 0, SHAPE)
    path.write_bytes(made.file(b"](" + tensor + b"q\x01" + b"h\x01" * 3 + b"e"))
    assert [r.error for r in read_all(path, **SAYS)] == [None] * 4
    path.write_bytes(made.file(b"](" + tensor + b"q\x01" + b"h\x01" * 10_000 + b"e"))
    errors = [record.error for record in read_arrays(path, **SAYS)]
    assert len(errors) < 3_000
    assert errors[-1] == (
        "describes tensors of over 16 times what it stores: save each one as tensor.clone()"
    )


def test_images_that_interleave_are_read_once(tmp_path: Path) -> None:
    batch = torch.randn(32, 2, 2, 5000)
    torch.save({"latents": batch.permute(3, 0, 1, 2), **SAYS}, tmp_path / "a.pt")
    start = time.process_time()
    records = list(read_arrays(tmp_path / "a.pt"))
    assert time.process_time() - start < 5
    assert len(records) == 5000
    last = records[-1].latents
    assert last is not None
    assert np.array_equal(last.array[0], batch[..., -1].numpy())


def test_arrays_that_grow_out_of_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    monkeypatch.setattr("latentguard.files.numpy_files.MIN_INFLATED", 2**20)
    np.savez_compressed(path, latents=np.zeros((1000, 32, 8, 8), np.float32), **SAYS)
    assert "save it with numpy.savez, without compression" in only_error(path)
    monkeypatch.undo()
    # Blank latents shrink by a thousand, and are honest.
    np.savez_compressed(path, latents=np.zeros((200, 32, 8, 8), np.float32), **SAYS)
    assert len(read_all(path)) == 200


def test_thousands_of_small_tensors(tmp_path: Path) -> None:
    tensors = [torch.full((32, 2, 2), float(index)) for index in range(1000)]
    torch.save({"latents": tensors, **SAYS}, tmp_path / "a.pt")
    records = list(read_arrays(tmp_path / "a.pt"))
    values = [r.latents.array[0, 0, 0, 0] for r in records if r.latents is not None]
    assert values == list(range(1000))


def test_pickles_of_other_protocols_say_what_to_do(tmp_path: Path) -> None:
    torch.save({"latents": flux2_batch(1), **SAYS}, tmp_path / "a.pt", pickle_protocol=4)
    assert "save it with torch.save's own pickle_protocol" in only_error(tmp_path / "a.pt")
    torch.save({"latents": flux2_batch(1), **SAYS}, tmp_path / "b.pt", pickle_protocol=3)
    assert read_all(tmp_path / "b.pt")[0].error is None
    assert pickle.DEFAULT_PROTOCOL > 3
