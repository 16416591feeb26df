"""Runs over other file systems: a web server that fails, and an S3 server; where runs lie there."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_server import serving
from run_helpers import options_of, plain, records_of, scan_run, write_shard, write_shards
from scan_helpers import write_latents

from latentguard.errors import UsageError
from latentguard.files import remote as remote_module
from latentguard.scan.sinks import read_part

fsspec = pytest.importorskip(
    "fsspec", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)
pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A bucket on a server of this machine, and what finds it in the environment."""
    s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    server_module = pytest.importorskip("moto.server", reason="the test's S3 server is moto")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patched.setenv("AWS_ACCESS_KEY_ID", "test")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Connections are kept by what they were asked with, which the port is no part of, and a
        # worker may come back to this module.
        s3fs.S3FileSystem.clear_instance_cache()
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        yield fs
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def _without_source(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "source"} for row in rows]


def _remote_records(fs: Any, run: Any, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for shard in run.shards:
        part = run.done[shard.number].part.name
        local = folder / Path(part).name
        fs.get_file(f"{run.place}/{part}", str(local))
        rows += read_part(local)
    return rows


def test_an_address_that_answers_500_half_of_the_time(tmp_path: Path, calm: Path) -> None:
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp, which the dev extra brings")
    shards = write_shards(tmp_path / "shards", 4, 2)
    options = options_of(calm)
    whole = plain(shards, calm)
    random_ = random.Random(2)
    with serving(tmp_path / "shards") as server:
        address = f"{server.address}/{{00000..00003}}.tar?signature=secret"
        server.fails = lambda: random_.random() < 0.5
        run = scan_run(tmp_path / "run", options, [address])
        server.fails = lambda: False
        # With bad luck a shard failed eight times in a row; then it is in the quarantine.
        address = address.replace("secret", "of-today")
        run = scan_run(tmp_path / "run", options, [address], resume=True)
        rows = records_of(run)
        assert [row["source"] for row in rows[::2]] == [
            f"{server.address}/{n:05d}.tar::{n:03d}000.latent.npy" for n in range(4)
        ]
    assert _without_source(rows) == _without_source(whole)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"signature" not in path.read_bytes()


def test_an_address_that_is_down_is_tried_again_by_the_next(tmp_path: Path, calm: Path) -> None:
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp, which the dev extra brings")
    shards = write_shards(tmp_path / "shards", 2, 2)
    options = options_of(calm)
    with serving(tmp_path / "shards") as server:
        addresses = [f"{server.address}/0000{n}.tar" for n in range(2)]
        server.fails = lambda: True
        run = scan_run(tmp_path / "run", options, addresses)
        assert [entry.errors for entry in run.done.values()] == [1, 1]
        quarantine = run.done[0].quarantine
        assert quarantine is not None
        (line,) = (tmp_path / "run" / quarantine.name).read_text().splitlines()
        assert "failed 8 times (500" in json.loads(line)["error"]
        server.fails = lambda: False
        run = scan_run(tmp_path / "run", options, addresses, resume=True)
        assert _without_source(records_of(run)) == _without_source(plain(shards, calm))


def test_no_room_for_a_copy_ends_a_run_that_can_go_on(tmp_path: Path, calm: Path) -> None:
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp, which the dev extra brings")
    shards = write_shards(tmp_path / "shards", 2, 2)
    run = tmp_path / "run"
    code = "import sys; from latentguard.cli import main; sys.exit(main())"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    with serving(tmp_path / "shards") as server:
        address = f"{server.address}/{{00000..00001}}.tar"
        given = ["scan", address, "--run", run, "--policy", calm, "--workers", 1]
        command = [sys.executable, "-c", code, *map(str, given)]
        ran = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
        assert ran.returncode == 2
        assert "File too large; run" in ran.stderr
        assert "0 of 2 shards are done; --resume continues it" in ran.stderr
        again = scan_run(run, options_of(calm), [address], resume=True)
        assert _without_source(records_of(again)) == _without_source(plain(shards, calm))


def test_shards_and_runs_on_s3(tmp_path: Path, calm: Path, s3: Any) -> None:
    shards = write_shards(tmp_path / "shards", 3, 2)
    small = write_latents(tmp_path / "small.safetensors", 2, seed=7)
    for path in (*shards, small):
        s3.put_file(str(path), f"bucket/data/{path.name}")
    s3.pipe_file("bucket/data/notes.txt", b"ours")
    options = options_of(calm, keep=None)
    place = "s3://bucket/run"
    run = scan_run(place, options, ["s3://bucket/data"], workers=1)
    assert [len(shard.files) for shard in run.shards] == [1, 1, 1, 1]
    rows = _remote_records(s3, run, tmp_path)
    assert _without_source(rows) == _without_source(plain([*shards, small], calm))
    assert rows[0]["source"] == "s3://bucket/data/00000.tar::000000.latent.npy"
    # Nothing has changed.
    assert scan_run(place, options, ["s3://bucket/data"], resume=True).notes == []
    # A shard has another content, a part is gone, and an entry is cut off.
    write_shard(shards[0], 2, seed=8)
    s3.put_file(str(shards[0]), "bucket/data/00000.tar")
    s3.rm_file(f"bucket/run/{run.done[1].part.name}")
    s3.pipe_file("bucket/run/manifest/000002.json", b'{"schema')
    again = scan_run(place, options, ["s3://bucket/data"], resume=True)
    assert "s3://bucket/data/00000.tar: changed since it was scanned" in again.notes[0]
    rows = _remote_records(s3, again, tmp_path)
    assert _without_source(rows) == _without_source(plain([*shards, small], calm))


def test_kept_samples_of_a_remote_shard(tmp_path: Path, calm: Path, s3: Any) -> None:
    shard = write_shard(tmp_path / "a.tar", 3)
    s3.put_file(str(shard), "bucket/keep/a.tar")
    run = scan_run("s3://bucket/kept", options_of(calm, keep="allow"), ["s3://bucket/keep/a.tar"])
    kept = run.done[0].kept
    assert kept is not None
    s3.get_file(f"bucket/kept/{kept.name}", str(tmp_path / "copy.tar"))
    assert _members(tmp_path / "copy.tar") == _members(shard)


def test_a_driver_that_was_killed_holds_nothing_on_s3(tmp_path: Path, calm: Path, s3: Any) -> None:
    shards = write_shards(tmp_path / "shards", 2, 1)
    code = (
        "import sys, time; from latentguard.policy import load_policy\n"
        "from latentguard.scan import RunOptions, open_run\n"
        "options = RunOptions(load_policy(sys.argv[1]), device='cpu')\n"
        "run = open_run('s3://bucket/driver', options, options.judges(), sys.argv[2:])\n"
        "print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(calm), *map(str, shards)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(
        UsageError, match=f"^process {holder.pid} on .* is at work on the run in s3"
    ):
        scan_run("s3://bucket/driver", options_of(calm), shards, resume=True)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert s3.exists("bucket/driver/task-0-of-1.lock")
    run = scan_run("s3://bucket/driver", options_of(calm), shards, resume=True)
    assert _remote_records(s3, run, tmp_path) == plain(shards, calm)
    assert not s3.exists("bucket/driver/task-0-of-1.lock")


def _members(path: Path) -> dict[str, bytes]:
    import tarfile

    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


def test_a_run_on_a_file_system_that_shows_half_an_upload(
    tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentguard.scan import store as store_module

    monkeypatch.setattr(store_module, "_WHOLE_UPLOADS", set())
    shards = write_shards(tmp_path / "shards", 2, 1)
    fs = fsspec.filesystem("memory")
    run = scan_run("memory://run-in-halves", options_of(calm), shards)
    assert _remote_records(fs, run, tmp_path) == plain(shards, calm)
    fs.pipe_file("/run-in-halves/parts/.000000.parquet.part", b"half")
    again = scan_run("memory://run-in-halves", options_of(calm), shards, resume=True)
    assert "removed 1 file" in again.notes[0]
    assert not [name for name in fs.find("/run-in-halves") if name.endswith(".part")]
    fs.rm("/run-in-halves", recursive=True)


def test_the_command_reads_addresses(tmp_path: Path, calm: Path, command: Any, s3: Any) -> None:
    file = write_latents(tmp_path / "a.safetensors", 2)
    s3.put_file(str(file), "bucket/plain/a.safetensors")
    ran = command("scan", "s3://bucket/plain", "--policy", calm, "--format", "json")
    assert ran.code == 0
    sources = [json.loads(line)["source"] for line in ran.out.splitlines()]
    assert sources == ["s3://bucket/plain/a.safetensors"] * 2
    ran = command("scan", "s3://bucket/none/", "--policy", calm, "--format", "json")
    assert (ran.code, "does not exist" in ran.out) == (3, True)
