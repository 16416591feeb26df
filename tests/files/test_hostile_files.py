"""Untrusted files: nothing runs, nothing large is allocated, nothing hides, the rest is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_helpers import flux2_batch, npy_bytes, only_error, read_all, torch_bytes, write_tar

from latentguard.files import read_latents
from latentguard.files.bounds import MAX_METADATA, MAX_PICKLE, MAX_SAFETENSORS_HEADER

SAYS: dict[str, Any] = {"space": "flux2", "scaled": True}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def rebuilt(data: bytes, changes: dict[str, bytes], extra: dict[str, bytes] | None = None) -> bytes:
    """A zip archive with other bytes in some entries (by the end of their name), and more."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            name = entry.filename
            suffix = next((s for s in changes if name.endswith(s)), None)
            new.writestr(name, old.read(entry) if suffix is None else changes[suffix])
        for name, content in (extra or {}).items():
            new.writestr(name, content)
    return buffer.getvalue()


def structure(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def safetensors_bytes(header: Any, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


# -- pickles ---------------------------------------------------------------------------------


def payload_files(folder: Path, target: Path) -> list[Path]:
    """The payload in everything that could be unpickled."""
    payload = Payload(target)
    bare = pickle.dumps(payload)
    (folder / "bare.pt").write_bytes(bare)
    (folder / "protocol0.pth").write_bytes(pickle.dumps(payload, protocol=0))
    torch.save({"latents": flux2_batch(), **SAYS, "x": payload}, folder / "dict.pt")
    torch.save(payload, folder / "object.pt")
    torch.save(payload, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    np.save(folder / "object.npy", np.array([payload], dtype=object), allow_pickle=True)
    np.savez(folder / "a.npz", latents=np.array([payload], dtype=object))
    np.savez(
        folder / "b.npz", latents=flux2_batch().numpy(), space=np.array([payload]), scaled=True
    )
    good = torch_bytes({"latents": flux2_batch(), **SAYS})
    (folder / "swapped.pt").write_bytes(rebuilt(good, {"data.pkl": bare}))
    (folder / "second.pt").write_bytes(rebuilt(good, {}, {"archive/DATA.pkl": bare}))
    (folder / "renamed.safetensors").write_bytes(bare)
    (folder / "renamed.npy").write_bytes(bare)
    write_tar(folder / "shard.tar", {"k.latent.pt": torch_bytes(payload), "l.latent.pt": bare})
    return sorted(folder.iterdir())


def test_pickle_payloads_are_refused_and_never_run(tmp_path: Path) -> None:
    target = tmp_path / "payload-ran"
    (tmp_path / "files").mkdir()
    paths = payload_files(tmp_path / "files", target)
    for path in paths:
        for record in read_all(path):
            assert record.latents is None, path
            assert not target.exists(), f"{path} ran its payload"
    # The payload does work where pickle is trusted.
    torch.load(tmp_path / "files" / "object.pt", weights_only=False)
    assert target.exists()


def test_what_a_refused_pickle_says(tmp_path: Path) -> None:
    target = tmp_path / "payload-ran"
    (tmp_path / "files").mkdir()
    payload_files(tmp_path / "files", target)
    says = {p.name: read_all(p)[0].error or "" for p in (tmp_path / "files").iterdir()}
    for name in ("dict.pt", "object.pt", "swapped.pt", "shard.tar"):
        assert "system" in says[name] or "opcode" in says[name], says[name]
        assert "nothing of it was executed" in says[name]
    for name in ("bare.pt", "legacy.pt"):
        assert "is a bare pickle" in says[name]
    assert "twice" in says["second.pt"]
    assert "objects, which would have to be unpickled" in says["object.npy"]


def test_globals_that_weights_only_would_allow_but_latents_do_not_need(tmp_path: Path) -> None:
    # torch's allow-list holds bytearray: 100 GB of zeros from a few bytes of pickle.
    bomb = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\xe8vH\x17\x85R."
    good = torch_bytes(flux2_batch())
    (tmp_path / "a.pt").write_bytes(rebuilt(good, {"data.pkl": bomb}))
    assert "holds a pickled object (__builtin__.bytearray)" in only_error(tmp_path / "a.pt")
    torch.save({"latents": flux2_batch().numpy(), **SAYS}, tmp_path / "b.pt")
    assert "numpy" in only_error(tmp_path / "b.pt")
    torch.save({"latents": torch.eye(4).to_sparse(), **SAYS}, tmp_path / "c.pt")
    assert "holds a pickled object" in only_error(tmp_path / "c.pt")


def test_tensors_larger_than_their_storage(tmp_path: Path) -> None:
    good = torch_bytes(torch.zeros(1, 32, 8, 8))
    pkl = structure(good)
    # 32 * 8 * 8 = 2048 = b"M\x00\x08" is the storage's count; the shape is (1, 32, 8, 8).
    shape = b"(K\x01K K\x08K\x08t"
    assert pkl.count(shape) == 1
    huge = b"(J\xff\xff\xff\x7fK K\x08K\x08t"
    (tmp_path / "a.pt").write_bytes(rebuilt(good, {"data.pkl": pkl.replace(shape, huge)}))
    assert "reaches beyond its 2048 numbers" in only_error(tmp_path / "a.pt", **SAYS)
    count = b"M\x00\x08t"
    assert pkl.count(count) == 1
    more = pkl.replace(count, b"J\xff\xff\xff\x7ft")
    (tmp_path / "b.pt").write_bytes(rebuilt(good, {"data.pkl": more}))
    assert "needs 8589934588 bytes, the archive holds 8192" in only_error(tmp_path / "b.pt", **SAYS)
    torch.save(torch.zeros(1).expand(10**6, 4, 64, 64), tmp_path / "c.pt")
    assert "holds an expanded tensor" in only_error(tmp_path / "c.pt", **SAYS)
    torch.save(torch.zeros(4).as_strided((3, 4), (0, 1)), tmp_path / "d.pt")
    assert "holds an expanded tensor" in only_error(tmp_path / "d.pt", **SAYS)


def test_keys_whose_hash_takes_for_ever(tmp_path: Path) -> None:
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    pkl = b"\x80\x02}" + pickle.dumps(nested, protocol=2)[2:-1] + b"K\x01s."
    (tmp_path / "a.pt").write_bytes(rebuilt(torch_bytes(flux2_batch()), {"data.pkl": pkl}))
    assert "keys are not names" in only_error(tmp_path / "a.pt", **SAYS)


def test_lists_that_hold_themselves(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    pkl = pickle.dumps(loop, protocol=2)
    (tmp_path / "a.pt").write_bytes(rebuilt(torch_bytes(flux2_batch()), {"data.pkl": pkl}))
    assert only_error(tmp_path / "a.pt", **SAYS) == "latents must be tensors, got list"


def test_archives_that_are_none(tmp_path: Path) -> None:
    good = torch_bytes(flux2_batch())
    path = tmp_path / "a.pt"
    path.write_bytes(good[:-100])
    assert "truncated" in only_error(path, **SAYS)
    path.write_bytes(good[: len(good) // 2])
    assert "truncated" in only_error(path, **SAYS)
    path.write_bytes(good[100:])
    assert "is not a file of torch.save" in only_error(path, **SAYS)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 10**6)
    assert "compressed or encrypted" in only_error(path, **SAYS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"." * (MAX_PICKLE + 1))
    assert f"over the limit of {MAX_PICKLE}" in only_error(path, **SAYS)
    path.write_bytes(rebuilt(good, {}, {"archive/constants.pkl": b"\x80\x02)."}))
    assert "TorchScript" in only_error(path, **SAYS)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**31, 0, 0)
    path.write_bytes(good + end)
    assert "table of contents of 2147483648 bytes" in only_error(path, **SAYS)


# -- headers ---------------------------------------------------------------------------------


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x93NUM", "is not a .npy file, or is truncated"),
        (b"\x93NUMPY\x07\x00" + b"\0" * 99, "has .npy version 7.0"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**31), "header of 2147483648 bytes, over the l"),
        (npy_header("__import__('os').system('true')"), "has a damaged .npy header"),
        (npy_header("(" * 9000), "has a damaged .npy header"),
        (npy_header("{'descr': '<f4', 'fortran_order': False}"), "has a damaged .npy header"),
        (
            npy_header(
                "{'descr': '<f4', 'fortran_order': False, 'shape': (250000, 4, 160, 160), }"
            ),
            "is truncated: the header says shape [250000, 4, 160, 160] of float32, 102400000000 b",
        ),
        (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4, 8, 8), }"),
            "has an impossible shape",
        ),
        (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4, 8, 8), }"),
            "the latents are empty",
        ),
        (
            npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }") + b"\0" * 8,
            "would have to be unpickled",
        ),
        (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }") + b"\0" * 16,
            "[B, C, H, W], [C, H, W] or packed [B, N, C], got shape [4]",
        ),
        (
            npy_bytes(np.zeros((1, 4, 8, 8), np.int64)),
            "must be float16, float32 or float64, got int",
        ),
        (npy_bytes(np.zeros((1, 4, 8, 8), np.complex64)), "got complex64"),
        (
            npy_bytes(np.zeros((1, 4, 8, 8), np.float32)) + b"more",
            "has more data after its numbers",
        ),
        (npy_bytes(np.zeros((1, 4, 8, 8), np.float32))[:-1], "is truncated"),
        (npy_bytes(np.zeros((1, 4, 1, 2**21), np.float16)), "2097152 latent cells"),
        (npy_bytes(np.zeros((1, 640, 2, 2), np.float16)), "640 channels"),
        (npy_bytes(np.zeros((1, 1, 4, 8, 8), np.float16)), "got shape [1, 1, 4, 8, 8]"),
    ],
)
def test_npy_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    assert message in only_error(tmp_path / "a.npy", space="sdxl", scaled=True)


GOOD_TENSOR = {"dtype": "F32", "shape": [1, 4, 2, 2], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1234567", "fewer than 8 bytes"),
        (struct.pack("<Q", 100 * 2**30) + b"{}", "its header should have 107374182400 bytes"),
        (
            struct.pack("<Q", MAX_SAFETENSORS_HEADER + 1) + b" " * (MAX_SAFETENSORS_HEADER + 1),
            "over the limit",
        ),
        (safetensors_bytes(b"nonsense"), "it is not JSON"),
        (safetensors_bytes(b"[" * 100_000), "it is not JSON"),
        (safetensors_bytes([1]), "not a JSON object"),
        (safetensors_bytes({}), "needs a tensor named latents, it holds nothing"),
        (safetensors_bytes({"latents": 1}), "damaged safetensors header: tensor 'latents'"),
        (safetensors_bytes({"latents": GOOD_TENSOR}, b"\0" * 63), "ends at byte 64, 63 bytes are"),
        (
            safetensors_bytes(
                {
                    "latents": {
                        "dtype": "F32",
                        "shape": [250000, 4, 160, 160],
                        "data_offsets": [0, 102400000000],
                    }
                }
            ),
            "is truncated",
        ),
        (safetensors_bytes({"latents": {**GOOD_TENSOR, "data_offsets": [0, 60]}}), "does not fill"),
        (safetensors_bytes({"latents": {**GOOD_TENSOR, "dtype": "I64"}}), "must be F16, BF16, F32"),
        (safetensors_bytes({"latents": {**GOOD_TENSOR, "shape": [1] * 9}}), "damaged"),
        (safetensors_bytes({"latents": {**GOOD_TENSOR, "shape": [-1, -4, 2, 2]}}), "damaged"),
        (safetensors_bytes({"__metadata__": 3, "latents": GOOD_TENSOR}), "damaged metadata"),
        (
            safetensors_bytes({"__metadata__": {"space": "sd9"}, "latents": GOOD_TENSOR}),
            "space must be one of sdxl, sd1, sd3, flux1, flux2, wan21",
        ),
        (
            safetensors_bytes({"__metadata__": {"scaled": "perhaps"}, "latents": GOOD_TENSOR}),
            "metadata scaled must be JSON, got 'perhaps'",
        ),
        (
            safetensors_bytes({"__metadata__": {"ids": '"a"'}, "latents": GOOD_TENSOR}),
            "ids must be a list of names",
        ),
    ],
)
def test_safetensors_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    assert message in only_error(tmp_path / "a.safetensors", space="sdxl", scaled=True)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"space": "sd9"}, "space must be one of"),
        ({"space": ["sdxl"]}, "space must be one of"),
        ({"scaled": 1}, "scaled must be true or false, got 1"),
        ({"scaled": torch.ones(())}, "scaled must be true or false, got Tensor"),
        ({"layout": "tokens"}, "layout must be spatial or packed or patches, got 'tokens'"),
        ({"height": -8, "width": 8}, "height must be a number of latent cells, got -8"),
        ({"ids": "abc"}, "ids must be a list of names, got 'abc'"),
        ({"ids": [1.5]}, "an id must be a string or a whole number, got 1.5"),
        ({"ids": ["x" * 2000]}, "an id has 2000 characters"),
        ({"scale": "big"}, "scale must be a finite number or one per channel"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": [1.0, 2.0]}, "scale must be one number, 32 or 128 numbers, got 2"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"latents": []}, "holds an empty list"),
        ({"latents": "x"}, "latents must be tensors, got str"),
        ({"latents": [["x"]]}, "latents must be tensors, got list"),
        (
            {"latents": torch.zeros(2, 32, 8, 8, dtype=torch.int16)},
            "floating point numbers, got in",
        ),
        ({"latents": torch.zeros(0, 32, 8, 8)}, r"the latents are empty (shape [0, 32, 8, 8])"),
        ({"latents": torch.zeros(8, 8)}, "got shape [8, 8]"),
        ({"latents": torch.zeros(1, 16, 8, 8)}, "must be [B, 32, H, W], got [1, 16, 8, 8]"),
    ],
)
def test_declarations(tmp_path: Path, says: dict[str, Any], message: str) -> None:
    torch.save({"latents": flux2_batch(1), **SAYS, **says}, tmp_path / "a.pt")
    assert message in only_error(tmp_path / "a.pt")


def test_wrong_number_of_ids_is_reported_after_the_images(tmp_path: Path) -> None:
    torch.save({"latents": flux2_batch(3), **SAYS, "ids": ["a", "b"]}, tmp_path / "a.pt")
    records = read_all(tmp_path / "a.pt")
    assert [r.id for r in records] == ["a", "b", None, None]
    assert records[-1].error == "has 2 ids for 3 images"
    assert records[-1].index == 3


def test_npz_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    assert "is not a zip archive" in only_error(path, **SAYS)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("latents.npy", npy_bytes(flux2_batch().numpy()))
    assert "unknown compression 12" in only_error(path, **SAYS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("latents.npy", npy_bytes(flux2_batch().numpy()))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("latents.npy", npy_bytes(flux2_batch().numpy()))
    assert "holds 'latents' twice" in only_error(path, **SAYS)
    np.savez(path, latents=flux2_batch().numpy())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    # Uncompressed numbers carry a checksum, which is known at the end only.
    assert "is a damaged .npz: Bad CRC-32" in (read_all(path, **SAYS)[-1].error or "")
    np.savez_compressed(path, latents=flux2_batch().numpy(), scaled=np.zeros(2**20))
    assert "holds 'scaled.npy' of 8388736 bytes: too long" in only_error(path)


def test_hostile_sizes_allocate_nothing(tmp_path: Path) -> None:
    """All files that announce 100 GB, read with 768 MB of address space left."""
    shape = [250000, 4, 160, 160]
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    (tmp_path / "a.npy").write_bytes(npy_header(text))
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY\x03\x00" + struct.pack("<L", 2**32 - 1))
    (tmp_path / "c.safetensors").write_bytes(struct.pack("<Q", 100 * 2**30))
    header = {"latents": {"dtype": "F32", "shape": shape, "data_offsets": [0, 102400000000]}}
    (tmp_path / "d.safetensors").write_bytes(safetensors_bytes(header))
    good = torch_bytes(torch.zeros(1, 32, 8, 8))
    pkl = structure(good)
    big = pkl.replace(b"(K\x01K K\x08K\x08t", b"(J\x00\x00\x10\x00K K\x40K\x40t")
    (tmp_path / "e.pt").write_bytes(rebuilt(good, {"data.pkl": big}))
    big = pkl.replace(b"M\x00\x08t", b"\x8a\x05\x00\xe8vH\x17t")
    (tmp_path / "f.pt").write_bytes(rebuilt(good, {"data.pkl": big}))
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe8vH\x17\x85R."
    (tmp_path / "g.pt").write_bytes(rebuilt(good, {"data.pkl": bomb}))
    torch.save(torch.zeros(1, dtype=torch.float64).expand(10**7, 4, 64, 64), tmp_path / "h.pt")
    text_bomb = b"\x80\x02X" + struct.pack("<L", 2**32 - 1) + b"."
    (tmp_path / "i.pt").write_bytes(rebuilt(good, {"data.pkl": text_bomb}))
    memo = b"\x80\x02]r\xff\xff\xff\xff."
    (tmp_path / "j.pt").write_bytes(rebuilt(good, {"data.pkl": memo}))
    with zipfile.ZipFile(tmp_path / "k.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("latents.npy", npy_header(text) + b"\0" * 10**6)
    # 128 MB of zeros where the names should be.
    np.savez_compressed(tmp_path / "l.npz", latents=flux2_batch().numpy(), ids=np.zeros(2**24))
    info = tarfile.TarInfo("x.latent.npy")
    info.size = 100 * 2**30
    (tmp_path / "m.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    info.type = tarfile.XHDTYPE
    (tmp_path / "n.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    np.save(tmp_path / "z.npy", flux2_batch(2).numpy())
    code = textwrap.dedent(
        f"""
        import resource, torch
        from latentguard.files import read_latents
        list(read_latents([{str(tmp_path / "z.npy")!r}]))  # imports what reading imports
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = used + 768 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for record in read_latents([{str(tmp_path)!r}], space="flux2", scaled=True):
            print(record.source[-15:].rpartition("/")[2], "|", record.error)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    lines = [line.split(" | ") for line in result.stdout.splitlines() if " | " in line]
    assert [name[0] for name, _ in lines] == list("abcdefghijklmnzz")
    for name, error in lines:
        assert (error == "None") == name.startswith("z"), (name, error)
        assert "memory" not in error.lower(), (name, error)


# -- shards ----------------------------------------------------------------------------------


def three_member_shard(path: Path) -> list[int]:
    """A shard of a, b, c, and where each member's header begins."""
    write_tar(path, {f"{k}.latent.npy": npy_bytes(flux2_batch(1).numpy()) for k in "abc"})
    with tarfile.open(path) as archive:
        return [member.offset for member in archive]


def ids_and_errors(path: Path) -> list[str]:
    return [
        r.id or f"! {r.error}" if r.error is None else f"! {r.error}"
        for r in read_all(path, **SAYS)
    ]


def test_a_damaged_member_does_not_stop_the_others(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {
            "a.latent.npy": npy_bytes(flux2_batch(1).numpy()),
            "b.latent.npy": b"rubbish",
            "c.latent.pt": b"",
            "d.json": b"{",
            "d.latent.npy": npy_bytes(flux2_batch(1).numpy()),
            "e.json": b'{"space": "sdxl"}',
            "e.latent.npy": npy_bytes(flux2_batch(1).numpy()),
            "f.json": b"[1]",
            "f.latent.npy": npy_bytes(flux2_batch(1).numpy()),
            "g.json": b" " * (MAX_METADATA + 1),
            "g.latent.npy": npy_bytes(flux2_batch(1).numpy()),
            "h.latent.npy": npy_bytes(flux2_batch(1).numpy()),
        },
    )
    assert ids_and_errors(path) == [
        "a",
        "! is not a .npy file, or is truncated",
        "! is an empty member",
        "! d.json is not JSON",
        "! the file says space 'sdxl', the option given says 'flux2'",
        "! f.json must be a JSON object",
        f"! g.json has {MAX_METADATA + 1} bytes, over the limit of {MAX_METADATA}",
        "h",
    ]


def test_a_damaged_header_loses_its_member_only(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    offsets = three_member_shard(path)
    data = bytearray(path.read_bytes())
    data[offsets[1] + 10] ^= 0xFF
    path.write_bytes(data)
    # Python's own tarfile ends here without a word.
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 1
    lost = offsets[2] - offsets[1]
    assert ids_and_errors(path) == [
        "a",
        f"! has a damaged part: {lost} bytes from byte {offsets[1]} on cannot be read",
        "c",
    ]


def test_a_truncated_shard_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    offsets = three_member_shard(path)
    data = path.read_bytes()
    cut = "! is truncated: c.latent.npy has 8320 bytes, 188 are there"
    path.write_bytes(data[: offsets[2] + 700])
    assert ids_and_errors(path) == ["a", "b", cut]
    path.write_bytes(data[: offsets[2]])
    no_end = "! is truncated: the archive has no end mark, so members may be missing"
    assert ids_and_errors(path) == ["a", "b", no_end]


def test_nothing_hides_behind_the_end_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    three_member_shard(path)
    path.write_bytes(path.read_bytes() * 2)
    assert ids_and_errors(path) == list("abcabc")


def test_links_and_empty_shards(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("a.latent.pt", tarfile.SYMTYPE), ("b.latent.pt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert ids_and_errors(path)[:2] == [
        "! a.latent.pt is not a regular file (a link, or sparse)",
        "! b.latent.pt is not a regular file (a link, or sparse)",
    ]
    write_tar(path, {"a.jpg": b"x"})
    assert "holds no KEY.latent.pt" in only_error(path)
    path.write_bytes(b"\x1f\x8b" + os.urandom(2000))
    assert "is not a tar archive" in read_all(path)[0].error  # type: ignore[operator]
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b")
    assert "unpack it to .tar" in only_error(tmp_path / "b.tar.gz")
    # In a folder they are reported too.
    assert sum("unpack it" in (r.error or "") for r in read_latents([tmp_path])) == 1


def test_member_names_are_printable(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"\x1b[31m\n.latent.npy": b"rubbish"})
    (record,) = read_all(path)
    assert record.source == f"{path}::?[31m?.latent.npy"


@pytest.mark.parametrize("size", [0, 100, 511, 512, 1024])
def test_short_shards(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"\0" * size)
    assert read_all(path)
