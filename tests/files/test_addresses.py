"""Addresses of other file systems, ranges in braces, and lists: what they stand for, and copies."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from remote_server import serving

from latentguard.errors import LatentsError
from latentguard.files import PassedOver, read_arrays
from latentguard.files import remote as remote_module
from latentguard.files import scratch as scratch_module
from latentguard.files.addresses import Remote, _braces, found, shown
from latentguard.files.lists import listed
from latentguard.files.paths import Unreadable
from latentguard.files.remote import copied, state_of_address

fsspec = pytest.importorskip(
    "fsspec", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.001)


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of three files of latents and what does not hold any, in memory."""
    fs = fsspec.filesystem("memory")
    out = io.BytesIO()
    np.save(out, np.random.default_rng(0).normal(size=(2, 32, 16, 16)).astype("f4"))
    for name in ("a/0.npy", "a/1.npy", "a/b/2.npy"):
        fs.pipe_file(f"/set/{name}", out.getvalue())
    fs.pipe_file("/set/a/note.txt", b"hello")
    fs.pipe_file("/set/a/._0.npy", b"\x00\x05\x16\x07" + bytes(100))
    fs.pipe_file("/set/other/x.h5", b"\x89HDF")
    yield "memory://set"
    fs.rm("/set", recursive=True)


def _addresses(*paths: str, passed: PassedOver | None = None, strict: bool = False) -> list[str]:
    files = found(list(paths), passed or PassedOver(), strict)
    return [file.address if isinstance(file, Remote) else str(file) for file in files]


# -- what they stand for ---------------------------------------------------------------------


def test_ranges_and_choices() -> None:
    assert list(_braces("a{08..11}.tar")) == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert list(_braces("{x,y}/{0..1}")) == ["x/0", "x/1", "y/0", "y/1"]
    assert list(_braces("s3://b/{0..1}.tar")) == ["s3://b/0.tar", "s3://b/1.tar"]
    assert list(_braces("plain{}.tar")) == ["plain{}.tar"]
    assert list(_braces("{name}.tar")) == ["{name}.tar"]


def test_a_file_of_that_very_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a{0..3}.npy").write_bytes(b"x")
    assert _addresses("a{0..3}.npy") == ["a{0..3}.npy"]


@given(first=st.integers(0, 2000), more=st.integers(0, 50), digits=st.integers(1, 6))
def test_a_range_has_all_of_its_numbers(first: int, more: int, digits: int) -> None:
    text = f"{{{str(first).zfill(digits)}..{first + more}}}"
    names = list(_braces(f"/none/{text}.tar"))
    assert [int(Path(str(name)).stem) for name in names] == list(range(first, first + more + 1))
    assert all(len(Path(str(name)).stem) >= digits for name in names)


@pytest.mark.parametrize(
    ("path", "said"),
    [("a{9..1}", "ends before it begins"), ("{0..99999}{0..99999}", "10,000,000,000 files")],
)
def test_ranges_that_cannot_be(path: str, said: str) -> None:
    (error,) = found(path, PassedOver())
    assert isinstance(error, Unreadable)
    assert said in error.error


def test_folders_and_patterns_of_another_file_system(memory: str) -> None:
    passed = PassedOver()
    assert _addresses(f"{memory}/a", passed=passed) == [
        "memory:///set/a/0.npy",
        "memory:///set/a/1.npy",
        "memory:///set/a/b/2.npy",
    ]
    assert passed.files == {".txt": 1, "._*": 1}
    assert len(_addresses(f"{memory}/a/*.npy")) == 2
    assert len(_addresses(f"{memory}/**/*.npy")) == 3
    assert _addresses(f"{memory}/a/{{0..1}}.npy") == [f"{memory}/a/0.npy", f"{memory}/a/1.npy"]


def test_what_is_not_read_elsewhere_is_an_error_too(memory: str) -> None:
    (error,) = found(f"{memory}/other", PassedOver())
    assert isinstance(error, Unreadable)
    assert "could hold latents, but its type cannot be read" in error.error
    errors = [f for f in found(f"{memory}/a", PassedOver(), True) if isinstance(f, Unreadable)]
    assert len(errors) == 2
    assert "--strict" in errors[0].error
    for address, said in (
        (f"{memory}/none", "does not exist"),
        (f"{memory}/none*", "matches no file"),
        ("zzz://bucket/a.tar", "cannot be read: Protocol not known|cannot be opened: Protocol"),
        ("filecache::memory://set/a/0.npy", "is a chain of file systems"),
    ):
        (record,) = read_arrays(address)
        assert record.error is not None
        assert any(part in record.error for part in said.split("|")), record.error


def test_a_local_address_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"x")
    assert _addresses(f"file://{tmp_path}/a.npy") == [f"{tmp_path}/a.npy"]
    assert _addresses(f"file://{tmp_path}") == [f"{tmp_path}/a.npy"]


def test_secrets_are_not_shown() -> None:
    assert shown("https://me:word@host/a.tar?sig=secret#x") == "https://host/a.tar"
    assert shown("s3://bucket/what?is#this.tar") == "s3://bucket/what?is#this.tar"
    assert shown("/a?b") == "/a?b"


# -- lists -----------------------------------------------------------------------------------


def test_lists(tmp_path: Path, memory: str) -> None:
    lines = tmp_path / "shards.txt"
    lines.write_text("# ours\ns3://a/{0..9}.tar\n\n  b c.tar  \n")
    fsspec.filesystem("memory").pipe_file("/set/list.txt", b"far.tar\n")
    stdin = io.StringIO("from/stdin.tar\n")
    given = ["x.pt", f"@{lines}", "-", f"@{memory}/list.txt"]
    expected = ["x.pt", "s3://a/{0..9}.tar", "b c.tar", "from/stdin.tar", "far.tar"]
    assert list(listed(given, stdin)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lists no file"),
        ("# nothing\n", "lists no file"),
        ("a.tar\n@b.txt\n", "line 2: a list cannot name another list"),
        ("-\n", "line 1: a list cannot name another list"),
        ("x" * 70_000, "line 1: over 65536 characters"),
    ],
)
def test_lists_that_cannot_be(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(LatentsError, match=said):
        list(listed([f"@{tmp_path}/list"], io.StringIO()))
    with pytest.raises(LatentsError, match="cannot be read: No such file"):
        list(listed([f"@{tmp_path}/none"], io.StringIO()))


# -- copies ----------------------------------------------------------------------------------


def test_records_name_the_address(memory: str) -> None:
    records = list(read_arrays(f"{memory}/a/0.npy", "flux2", True))
    assert [(r.source, r.index, r.error) for r in records] == [
        (f"{memory}/a/0.npy", 0, None),
        (f"{memory}/a/0.npy", 1, None),
    ]


def test_a_server_that_fails_half_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp, which the dev extra brings")
    monkeypatch.setattr(remote_module, "_BLOCK", 10_000)
    data = os.urandom(200_000)
    (tmp_path / "a.tar").write_bytes(data)
    random_ = random.Random(1)
    with serving(tmp_path) as server:
        server.fails = lambda: random_.random() < 0.5
        with copied(f"{server.address}/a.tar?sig=x") as (path, state):
            assert path.read_bytes() == data
            assert path.suffix == ".tar"
            assert state.size == len(data)
        assert not path.exists()
        assert server.asked > 30


def test_a_connection_that_ends_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp, which the dev extra brings")
    monkeypatch.setattr(remote_module, "_BLOCK", 10_000)
    data = os.urandom(50_000)
    (tmp_path / "a.tar").write_bytes(data)
    with serving(tmp_path) as server:
        for turn in range(2):
            server.cut = 3_000 if turn else None
            if turn:
                with pytest.raises(LatentsError, match="cannot be read: failed 8 times"):  # noqa: SIM117
                    with copied(f"{server.address}/a.tar"):
                        pass
            else:
                with copied(f"{server.address}/a.tar") as (path, _):
                    assert path.read_bytes() == data


def test_a_server_that_fails_for_good_is_an_error_of_that_file(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp, which the dev extra brings")
    with serving(tmp_path) as server:
        (missing,) = read_arrays(f"{server.address}/none.npy")
        assert missing.error == "does not exist"
        before = server.asked
        server.fails = lambda: True
        (record,) = read_arrays(f"{server.address}/a.npy")
        assert record.error is not None
        assert record.error.startswith("cannot be read: failed 8 times")
        assert server.asked - before <= 2 * remote_module.ATTEMPTS


def test_a_file_that_changes_while_it_is_copied_is_an_error(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    fill = remote_module._fill

    def filled(*arguments: object) -> None:
        fill(*arguments)  # type: ignore[arg-type]
        fs.pipe_file("/set/a/0.npy", b"another one")

    monkeypatch.setattr(remote_module, "_fill", filled)
    (record,) = read_arrays(f"{memory}/a/0.npy", "flux2", True)
    assert record.error == "changed while it was read: scan it again when nothing writes to it"


def test_an_index_elsewhere_has_to_agree_with_its_shards(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    made = Path(__file__).parent / "mds" / "plain"
    for path in made.iterdir():
        fs.pipe_file(f"/set/mds/{path.name}", path.read_bytes())
    here = [(r.index, r.error) for r in read_arrays(made, "sdxl", True)]
    address = f"{memory}/mds"
    assert [(r.index, r.error) for r in read_arrays(address, "sdxl", True)] == here
    index = json.loads((made / "index.json").read_text())
    index["shards"][0]["column_encodings"] = index["shards"][0]["column_encodings"][::-1]
    fs.pipe_file("/set/mds/index.json", json.dumps(index).encode())
    (first, *_) = [r for r in read_arrays(address, "sdxl", True) if r.error]
    assert first.error is not None
    assert "does not agree with its index.json" in first.error
    fs.rm_file("/set/mds/index.json")
    assert [(r.index, r.error) for r in read_arrays(address, "sdxl", True)] == here


def test_a_shard_that_an_index_elsewhere_names_is_missed(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    made = Path(__file__).parent / "mds" / "plain"
    for path in made.iterdir():
        fs.pipe_file(f"/set/below/mds/{path.name}", path.read_bytes())
    address, passed = f"{memory}/below", PassedOver()
    whole = list(read_arrays(address, "sdxl", True, passed=passed))
    assert all(record.error is None for record in whole)
    assert passed.line() == ""  # the index is read, too
    fs.rm_file("/set/below/mds/shard.00001.mds")
    first, *rest = read_arrays(address, "sdxl", True)
    assert first.error == "is named by index.json but does not exist"
    assert first.source.endswith("/set/below/mds/shard.00001.mds")
    assert 0 < len(rest) < len(whole)
    assert all(record.error is None for record in rest)
    fs.pipe_file("/set/below/mds/index.json", b'{"shards": [{"format": "mds", "raw_data": 7}]}')
    first, *_ = read_arrays(address, "sdxl", True)
    assert first.error == "cannot be read: is a damaged index.json: a shard without a name"
    assert first.source.endswith("/set/below/mds/index.json")
    fs.pipe_file("/set/below/mds/index.json", b"[1, 2")
    first, *_ = read_arrays(address, "sdxl", True)
    assert "has an index.json beside it that is not JSON" in (first.error or "")
    # That of another tool says nothing of shards.
    fs.pipe_file("/set/below/mds/index.json", b"[1, 2]")
    assert all(record.error is None for record in read_arrays(address, "sdxl", True))


def test_a_state_tells_contents_apart(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp, which the dev extra brings")
    with serving(tmp_path) as server:
        states = set()
        for data in (b"one", b"two", b"three"):
            (tmp_path / "a.npy").write_bytes(data)
            states.add(state_of_address(f"{server.address}/a.npy"))
        assert len(states) == 3


def test_a_copy_without_room_is_no_error_of_the_file(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "_SPARE", 1 << 60)
    with pytest.raises(OSError, match="no room for a copy"):
        list(read_arrays(f"{memory}/a/0.npy", "flux2", True))


def test_copies_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from latentguard.files.scratch import scratch_folder\n"
        "(scratch_folder() / 'copy').write_bytes(b'x')\n"
        "print(scratch_folder(), flush=True)\n"
        "if len(sys.argv) > 1: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def run(*more: str) -> Path:
        command = [sys.executable, "-c", code, *more]
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=not more
        )
        return Path(ran.stdout.strip())

    killed = run("kill")
    assert (killed / "copy").exists()
    ended = run()
    assert not killed.exists()
    assert not ended.exists()


def _scratch_folders(tmp_path: Path, together: Barrier, lost: SimpleQueue[int]) -> None:
    """Make many, as processes do that begin at the same moment; say how many are gone."""
    tempfile.tempdir = str(tmp_path)
    together.wait()
    made = [scratch_module._made.__wrapped__(os.getpid()) for _ in range(30)]
    lost.put(sum(not (folder / "lock").exists() for folder in made))
    together.wait()


def test_processes_that_begin_together_leave_each_others_copies_alone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together, lost = context.Barrier(4), context.SimpleQueue()
    processes = [
        context.Process(target=_scratch_folders, args=(tmp_path, together, lost)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [lost.get() for _ in processes] == [0] * 4


def test_a_missing_extra_names_itself() -> None:
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from latentguard.files import read_arrays\n"
        "from latentguard.errors import MissingExtraError\n"
        "try: list(read_arrays('s3://bucket/a.tar'))\n"
        "except MissingExtraError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == (
        "s3://bucket/a.tar needs fsspec, which is not installed: pip install 'latentguard[scale]'"
    )
