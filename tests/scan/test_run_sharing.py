"""Several processes on one run: each shard is one's, and what another one writes is left alone."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import options_of, plain, records_of, scan_run, write_shards

from latentguard.errors import UsageError
from latentguard.scan import beat
from latentguard.scan.judging import Judging
from latentguard.scan.lease import hold
from latentguard.scan.local import run_local
from latentguard.scan.run import Run, open_run
from latentguard.scan.store import open_store

pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


def _opened(place: Path, calm: Path, shards: list[Path], task: tuple[int, int] = (0, 1)) -> Run:
    options = options_of(calm)
    paths = list(map(str, shards))
    return open_run(str(place), options, options.judges(), paths, resume=True, task=task)


def _partials(run: Path) -> set[str]:
    return {path.name for path in run.rglob(".*.part")}


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2, 1)
    first = _opened(tmp_path / "run", calm, shards)
    for task in ((0, 1), (1, 2)):
        with pytest.raises(UsageError, match=rf"^process {os.getpid()} on .* is at work on the"):
            _opened(tmp_path / "run", calm, shards, task)
    run_local(first, Judging(options_of(calm).judges()), workers=0)
    run = scan_run(tmp_path / "run", options_of(calm), shards, resume=True)
    assert records_of(run) == plain(shards, calm)
    assert not list((tmp_path / "run").glob("*.lock"))


def test_tasks_that_share_a_shard_are_refused(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 6, 1)
    tasks = [_opened(tmp_path / "run", calm, shards, (k, 3)) for k in (0, 1)]
    for task in ((1, 3), (1, 2), (4, 6)):
        with pytest.raises(UsageError, match="give each process its own shards"):
            _opened(tmp_path / "run", calm, shards, task)
    for task in ((2, 3), (5, 9)):
        _opened(tmp_path / "run", calm, shards, task).close()
    for run in tasks:
        run.close()
    _opened(tmp_path / "run", calm, shards).close()


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_shards_are_of_two_tasks_exactly_where_these_are_refused(
    tmp_path_factory: pytest.TempPathFactory, one: int, other: int, data: Any
) -> None:
    first = data.draw(st.integers(0, one - 1)), one
    second = data.draw(st.integers(0, other - 1)), other
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text("{}")
    shared = {n for n in range(one * other) if n % one == first[0] and n % other == second[0]}
    lease = hold(folder, folder / "run.json", first)
    assert lease is not None
    try:
        another = hold(folder, folder / "run.json", second)
    except UsageError:
        assert shared
    else:
        assert not shared
        assert another is not None
        another.release()
    lease.release()
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2, 1)
    run = tmp_path / "run"
    _opened(run, calm, shards).close()
    code = (
        "import sys, time; from pathlib import Path; from latentguard.scan.lease import hold\n"
        "lease = hold(Path(sys.argv[1]), Path(sys.argv[1]) / 'run.json', (0, 1))\n"
        "print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, run], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=f"^process {holder.pid} on"):
        _opened(run, calm, shards)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert list(run.glob("*.lock"))
    again = scan_run(run, options_of(calm), shards, resume=True)
    assert records_of(again) == plain(shards, calm)
    assert not list(run.glob("*.lock"))


def test_what_killed_writers_left_goes_with_its_own_task(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 4, 1)
    run = tmp_path / "run"
    judging = Judging(options_of(calm).judges())
    task = _opened(run, calm, shards, (0, 2))
    (run / "parts").mkdir()
    for name in (".000000-ab.part", ".000001-ab.part", ".000002-ab.part", ".ab.part"):
        (run / "parts" / name).write_bytes(b"half")
    (run / "parts" / "000002-of-another-attempt.parquet").write_bytes(b"whole, and no part of it")
    run_local(task, judging, workers=0)
    # The others may be being written now.
    assert _partials(run) == {".000001-ab.part", ".ab.part"}
    assert {path.name for path in (run / "parts").glob("*.parquet")} == {
        "000000-00000.parquet",
        "000002-00002.parquet",
    }
    scan_run(run, options_of(calm), shards, resume=True)
    assert not _partials(run)


def test_a_file_that_is_written_says_whose_it_is(tmp_path: Path) -> None:
    from latentguard.scan.store import open_store

    store = open_store(str(tmp_path))
    with store.writing("parts/000012-name.parquet") as path:
        assert path.name.startswith(".000012-")
        assert store.clean("parts", lambda number: number == 11) == 0
    code = (
        "import os, sys; from latentguard.scan.store import open_store\n"
        "with open_store(sys.argv[1]).writing('parts/000012-name.parquet'):\n"
        "    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert store.clean("parts", lambda number: number == 11) == 0
    assert store.clean("parts", lambda number: number == 12) == 1
    assert os.listdir(tmp_path / "parts") == ["000012-name.parquet"]


@pytest.mark.slow
def test_the_command_says_who_is_at_work(tmp_path: Path, calm: Path, command: Any) -> None:
    write_shards(tmp_path / "shards", 4, 40)
    code = "import sys; from latentguard.cli import main; sys.exit(main())"
    given = ["scan", tmp_path / "shards", "--run", tmp_path / "run", "--policy", calm, "--resume"]
    first = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given), "--batch-size", "1", "--workers", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((tmp_path / "run").glob("manifest/*.json")):
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        ran = command(*given)
        assert (ran.code, f"process {first.pid} on" in ran.err) == (2, True)
    finally:
        first.kill()
        first.wait()
    assert command(*given, "--workers", 0).code == 0


# -- object stores ---------------------------------------------------------------------------


def _elsewhere(name: str, calm: Path, shards: list[Path], told: list[str] | None = None) -> Run:
    pytest.importorskip("fsspec", reason="needs pip install 'latentguard[scale]'")
    options, paths = options_of(calm), list(map(str, shards))
    tell = [].append if told is None else told.append
    place = f"memory://{name}"
    return open_run(place, options, options.judges(), paths, resume=True, tell=tell)


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beat, "BEAT", 0.02)
    monkeypatch.setattr(beat, "PATIENCE", 1.0)
    monkeypatch.setattr(beat, "_LOOK", 0.02)


@pytest.mark.usefixtures("quick_beats")
def test_on_an_object_store_a_second_process_is_refused_too(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2, 1)
    first = _elsewhere("held", calm, shards)
    # The file system of the test may show a file while it is written: then nobody is named.
    refused = (
        rf"^(process {os.getpid()} on .*|another process) is at work on the run in memory://he"
    )
    with pytest.raises(UsageError, match=refused):
        _elsewhere("held", calm, shards)
    # Seen from another machine, it lives as long as its file changes.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(beat, "_machine", lambda: "another machine")
        told: list[str] = []
        with pytest.raises(UsageError, match=refused):
            _elsewhere("held", calm, shards, told)
        assert "waiting up to 1 seconds to see whether it is still at work" in told[0]
    run_local(first, Judging(options_of(calm).judges()), workers=0)
    assert "task-0-of-1.lock" not in open_store("memory://held").sizes("")
    _elsewhere("held", calm, shards).close()


@pytest.mark.usefixtures("quick_beats")
def test_what_a_killed_process_held_on_an_object_store_is_free_again(
    tmp_path: Path, calm: Path
) -> None:
    shards = write_shards(tmp_path / "shards", 2, 1)
    _elsewhere("left", calm, shards).close()
    store = open_store("memory://left")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    about = {"process": ended.pid, "host": "here", "machine": beat._machine(), "began": 1}
    for left, waits in ((about, beat._machine() is None), ({**about, "machine": "x"}, True)):
        store.write("task-0-of-1.lock", json.dumps(left).encode())
        told: list[str] = []
        _elsewhere("left", calm, shards, told).close()
        assert bool(told) == waits
    for damaged in (b"", b"[1]", b"{", b"\xff"):
        store.write("task-0-of-1.lock", damaged)
        _elsewhere("left", calm, shards).close()


@pytest.mark.usefixtures("quick_beats")
def test_a_process_that_lost_its_shards_stops(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 3, 1)
    run = _elsewhere("lost", calm, shards)
    store = open_store("memory://lost")
    judging = Judging(options_of(calm).judges())
    run.scan(run.shards[0], judging)
    store.write("task-0-of-1.lock", b'{"token": "of another process"}')
    time.sleep(0.3)
    with pytest.raises(UsageError, match="another process may be at work: let it end, and contin"):
        run_local(run, judging, workers=0)
    assert sorted(run.done) == [0]
    # What it had taken over is not removed.
    assert store.read("task-0-of-1.lock") == b'{"token": "of another process"}'


@pytest.mark.usefixtures("quick_beats")
def test_a_process_that_stood_still_stops(
    tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", 1, 1)
    monkeypatch.setattr(beat, "BEAT", 600.0)
    run = _elsewhere("still", calm, shards)
    monkeypatch.setattr(beat, "PATIENCE", 0.0)
    with pytest.raises(UsageError, match="was not renewed for more than 0 seconds"):
        run_local(run, Judging(options_of(calm).judges()), workers=0)
    assert not run.done


def test_of_two_that_take_an_object_stores_shards_at_once_one_is_refused(tmp_path: Path) -> None:
    store = open_store("memory://at-once")
    one, other = (beat.Beat(store, "memory://at-once", name) for name in _BOTH)
    one.begin((0, 2))
    with pytest.raises(UsageError, match="is at work on the run in memory://at-once"):
        other.begin((0, 1))
    assert set(store.sizes("")) == {_BOTH[0]}
    one.release()
    assert not store.sizes("")


_BOTH = ("task-0-of-2.lock", "task-0-of-1.lock")


def test_an_answer_that_was_lost_is_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://answer-lost")
    create = type(store).create
    monkeypatch.setattr(type(store), "create", lambda *args: create(*args) and False)
    held = beat.hold_elsewhere(store, "memory://answer-lost", (0, 1), [].append)
    assert held is not None
    held.release()
    assert beat.hold_elsewhere(store, "hf://datasets/a/run", (0, 1), [].append) is None


@pytest.mark.usefixtures("quick_beats")
def test_a_full_disk_for_a_moment_does_not_end_the_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://full-disk")
    held = beat.hold_elsewhere(store, "memory://full-disk", (0, 1), [].append)
    assert held is not None
    writing = type(store).writing
    failed: list[str] = []

    def full(self: Any, name: str) -> Any:
        if len(failed) < 3:
            failed.append(name)
            raise OSError(errno.ENOSPC, "no space left on device")
        return writing(self, name)

    monkeypatch.setattr(type(store), "writing", full)
    before = store.read("task-0-of-1.lock")
    until = time.monotonic() + 30
    while store.read("task-0-of-1.lock") == before and time.monotonic() < until:
        time.sleep(0.02)
    assert len(failed) == 3
    assert store.read("task-0-of-1.lock") != before
    held.release()


def test_a_process_that_is_not_seen_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    if beat._machine() is None:
        pytest.skip("needs Linux: processes are told apart by /proc")
    about = beat._about_this_process()
    assert beat._lives(about) is True
    assert beat._lives({**about, "began": 1}) is False
    assert beat._lives({**about, "machine": "x"}) is None
    monkeypatch.setattr(beat, "_began", lambda process: None)  # as with hidepid
    assert beat._lives(about) is None
