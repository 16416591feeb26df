"""What a run survives: killed processes, full disks, shards that change or are damaged."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_helpers import (
    options_of,
    plain,
    records_of,
    scan_run,
    write_shard,
    write_shards,
)

from latentguard.scan import ScanRecord, local
from latentguard.scan.reader import READY

pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


class _Killing:
    """Kills readers while a run goes on, at most `times` times."""

    def __init__(self, times: int, when: Callable[[], bool] = lambda: True) -> None:
        self.times, self._when = times, when
        self.killed = 0

    def __call__(self, records: Sequence[ScanRecord]) -> None:
        readers = multiprocessing.active_children()
        if self.killed < self.times and readers and self._when():
            os.kill(readers[0].pid or 0, signal.SIGKILL)
            self.killed += 1


def test_a_reader_that_is_killed_loses_nothing(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 3, 6)
    killing = _Killing(2)
    options = options_of(calm, batch_size=2)
    run = scan_run(tmp_path / "run", options, shards, 1, max_memory=1, told=killing)
    assert killing.killed == 2
    expected = scan_run(tmp_path / "whole", options, shards)
    assert records_of(run) == records_of(expected)
    assert [run.done[n].part for n in range(3)] == [expected.done[n].part for n in range(3)]


def test_a_shard_that_kills_its_readers_is_given_up(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2, 6)
    first = str(shards[0])

    def told(records: Sequence[ScanRecord]) -> None:
        if records[0].source.startswith(first):
            for reader in multiprocessing.active_children():
                os.kill(reader.pid or 0, signal.SIGKILL)

    options = options_of(calm, batch_size=2)
    run = scan_run(tmp_path / "run", options, shards, 1, max_memory=1, told=told)
    (record, *others) = records_of(run)
    assert record["decision"] == "block"
    assert record["error"] == "3 processes that read it died, the last one with signal 9"
    expected = records_of(scan_run(tmp_path / "whole", options, shards))
    assert others == [row for row in expected if not row["source"].startswith(first)]
    # Nothing says what it was, so it is tried again.
    again = scan_run(tmp_path / "run", options, shards, resume=True)
    assert records_of(again) == expected


def _command(run: Path, shards: Sequence[Path], policy: Path, *more: str) -> list[str]:
    code = "import sys; from latentguard.cli import main; sys.exit(main())"
    given = ["scan", *map(str, shards), "--run", str(run), "--policy", str(policy), "--resume"]
    return [sys.executable, "-c", code, *given, "--batch-size", "2", *more]


def _files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def _kill_when(
    command: list[str], ready: Callable[[], bool], by: signal.Signals = signal.SIGKILL
) -> int | None:
    """End a command as soon as `ready`: its exit code; None where it was at its end before.

    What it has started must end by itself.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # What a shell starts in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not ready():
        time.sleep(0.002)
    if process.poll() is not None:
        return None
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, by)
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    return process.returncode


@pytest.mark.parametrize(
    ("by", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_driver_that_is_killed_loses_nothing(
    tmp_path: Path, calm: Path, by: signal.Signals, code: int
) -> None:
    shards = write_shards(tmp_path / "shards", 3, 8)
    run = tmp_path / "run"
    parts = run / "parts"
    command = _command(run, shards, calm, "--workers", "1", "--max-memory", "1")
    begun = lambda: parts.is_dir() and any(parts.glob("*.parquet"))  # noqa: E731
    assert _kill_when(command, begun, by) == code
    options = options_of(calm, batch_size=2)
    again = scan_run(run, options, shards, resume=True)
    whole = scan_run(tmp_path / "whole", options, shards)
    assert records_of(again) == records_of(whole)
    assert _files(run) == _files(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 12, 8)
    options = options_of(calm, batch_size=2)
    whole = scan_run(tmp_path / "whole", options, shards)
    random_ = random.Random(0)
    run = tmp_path / "run"
    kills, begun = 0, 0
    while kills < 20:
        command = _command(run / str(begun), shards, calm, "--workers", "2", "--sink", "parquet")
        until = time.monotonic() + random_.uniform(1.0, 6.0)
        if _kill_when(command, lambda until=until: time.monotonic() > until):  # type: ignore[misc]
            kills += 1
        else:
            begun += 1  # it came to its end: kill another one
    for n in range(begun + 1):
        again = scan_run(run / str(n), options, shards, resume=True)
        assert records_of(again) == records_of(whole)
        assert _files(run / str(n)) == _files(tmp_path / "whole")


@pytest.mark.slow
def test_readers_killed_at_twenty_random_moments(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 20, 8)
    options = options_of(calm, batch_size=2)
    whole = records_of(scan_run(tmp_path / "whole", options, shards))
    random_ = random.Random(0)
    next_one = [0.0]

    def when() -> bool:
        if time.monotonic() < next_one[0]:
            return False
        next_one[0] = time.monotonic() + random_.uniform(0.1, 1.5)
        return True

    killing = _Killing(20, when)
    turn = 0
    while killing.killed < 20:
        turn += 1
        place = tmp_path / str(turn)
        run = scan_run(place, options, shards, 3, max_memory=1, told=killing)
        assert len(run.done) == 20
        # What was given up, as three of its readers were killed, is tried again.
        assert records_of(scan_run(place, options, shards, resume=True)) == whole


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_can_go_on(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2, 8)
    run = tmp_path / "run"
    command = _command(run, shards, calm, "--workers", "0", "--sink", "json")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))

    ran = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "File too large" in ran.stderr
    assert "0 of 2 shards are done; --resume continues it" in ran.stderr
    assert "Traceback" not in ran.stderr
    options = options_of(calm, batch_size=2, sink="json")
    again = scan_run(run, options, shards, resume=True)
    whole = scan_run(tmp_path / "whole", options, shards)
    assert records_of(again) == records_of(whole)
    assert _files(run) == _files(tmp_path / "whole")


def _mount(folder: Path, size: str) -> bool:
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    return made.returncode == 0


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_file_system_ends_a_run_that_can_go_on(
    tmp_path: Path, calm: Path, workers: int
) -> None:
    disk = tmp_path / "disk"
    if not _mount(disk, "64k"):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        shards = write_shards(tmp_path / "shards", 6, 8)
        options = options_of(calm, batch_size=2, sink="json")
        with pytest.raises(OSError, match="No space left"):
            scan_run(disk / "run", options, shards, workers)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = scan_run(disk / "run", options, shards, workers, resume=True)
        whole = scan_run(tmp_path / "whole", options, shards)
        assert records_of(again) == records_of(whole)
        assert _files(disk / "run") == _files(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_truncated_and_a_corrupted_shard_stop_nothing(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 4, 4)
    whole = plain(shards, calm)
    shards[1].write_bytes(shards[1].read_bytes()[:30_000])
    data = bytearray(shards[2].read_bytes())
    data[20_000:21_000] = os.urandom(1000)
    shards[2].write_bytes(data)
    run = scan_run(tmp_path / "run", options_of(calm), shards, 1)
    assert records_of(run) == plain(shards, calm)
    assert run.done[1].errors >= 1
    assert run.done[1].decisions["block"] >= 1
    assert run.done[1].quarantine is not None
    good = [r for r in records_of(run) if r["source"].startswith((str(shards[0]), str(shards[3])))]
    assert good == [r for r in whole if r["source"].startswith((str(shards[0]), str(shards[3])))]
    # The same files are damaged in the same way next time, so they are done.
    assert scan_run(tmp_path / "run", options_of(calm), shards, resume=True).notes == []


def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2, 8)
    options = options_of(calm, batch_size=2)
    changed: list[Any] = []

    def told(records: Sequence[ScanRecord]) -> None:
        if not changed:
            changed.append(write_shard(shards[0], 8, seed=5))

    run = scan_run(tmp_path / "run", options, shards, told=told)
    errors = [r["error"] for r in records_of(run) if r["error"]]
    assert errors == ["changed while it was read: scan it again when nothing writes to it"]
    again = scan_run(tmp_path / "run", options, shards, resume=True)
    assert "changed since it was scanned" in again.notes[0]
    assert records_of(again) == records_of(scan_run(tmp_path / "whole", options, shards))


def _dies_while_it_sends(pipe: Any, options: Any) -> None:
    """A reader that is killed within a message, as by the system for its memory."""
    pipe.send(READY)
    if pipe.recv() is not None:
        pipe.recv()
        os.write(pipe.fileno(), struct.pack("!i", 50_000_000) + bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_is_killed_while_it_sends_is_replaced(
    tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "serve", _dies_while_it_sends)
    shards = write_shards(tmp_path / "shards", 1, 2)
    run = scan_run(tmp_path / "run", options_of(calm), shards, 1)
    (row,) = records_of(run)
    assert row["error"].startswith("3 processes that read it died, the last one with signal 9")
    monkeypatch.undo()
    again = scan_run(tmp_path / "run", options_of(calm), shards, resume=True)
    assert records_of(again) == plain(shards, calm)


def test_a_file_that_could_not_be_listed_is_scanned_once_it_can(tmp_path: Path, calm: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (shard,) = write_shards(tmp_path / "shards", 1, 2)
    link = folder / "a.tar"
    link.symlink_to(tmp_path / "later.tar")
    run = scan_run(tmp_path / "run", options_of(calm), [folder])
    assert run.errors == 1
    shard.rename(tmp_path / "later.tar")
    again = scan_run(tmp_path / "run", options_of(calm), [folder], resume=True)
    assert again.errors == 0
    assert len(records_of(again)) == 2
