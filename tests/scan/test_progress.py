"""Progress: what is counted, what bounds a scan, and who is told."""

from __future__ import annotations

import io
import json
import threading
import urllib.request
from collections import Counter
from typing import Any

import pytest
from test_tally import broken, record, tally_of

from latentguard.errors import UsageError
from latentguard.scan.progress import Counts, Progress, State
from latentguard.scan.progress_views import Bar, JsonProgress, Metrics


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def images(allow: int = 0, block: int = 0) -> Counts:
    counts = Counter(allow=allow, block=block)
    return Counts(counts, counts, 1000 * (allow + block))


def test_what_an_engine_reports_adds_up() -> None:
    clock = Clock()
    progress = Progress(shards=10, done=2, workers={"read": 2}, clock=clock)
    for _ in range(4):
        clock.now += 5
        progress.update(images(90, 10), {"read": 9.0, "score": 1.0}, shards=1)
    state = progress.state()
    assert (state.images, state.blocked, state.bytes_read) == (400, 0.1, 400_000)
    assert (state.shards_done, state.shards, state.elapsed) == (6, 10, 20.0)
    assert state.rate == pytest.approx(20)
    assert state.busy == pytest.approx({"read": 0.9, "score": 0.2})
    assert state.bound == "reading"
    assert state.left == pytest.approx(20.0)  # 4 shards in 20 seconds, 4 to go


def test_rate_and_bound_are_those_of_late() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    for second in range(120):
        clock.now += 1
        slow = second >= 60
        phases = {"decode": 0.1, "score": 0.9} if slow else {"decode": 0.9, "score": 0.1}
        progress.update(images(1 if slow else 100), phases)
    state = progress.state()
    assert state.rate == pytest.approx(1, rel=0.1)
    assert state.bound == "scoring"
    assert state.left is None


def test_reading_that_is_reported_shard_by_shard_is_not_forgotten_between() -> None:
    clock = Clock()
    progress = Progress(workers={"read": 4}, clock=clock)
    for second in range(1, 2000):
        clock.now += 1
        shard = second % 300 == 0
        progress.update(images(5), {"score": 0.3, "read": 1100.0 if shard else 0.0})
        if second > 350:
            state = progress.state()
            assert state.bound == "reading", second
            assert state.busy["read"] == pytest.approx(1100 / 300 / 4, rel=0.12)
            assert state.busy["score"] == pytest.approx(0.3, rel=0.1)


def test_a_scan_that_stands_still_has_no_rate() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    for _ in range(100):
        clock.now += 1
        progress.update(images(5), {"score": 1.0})
    clock.now += 1000
    assert progress.state().rate < 0.2


def test_nothing_yet_is_no_division_by_zero() -> None:
    state = Progress(shards=3).state()
    assert (state.images, state.blocked, state.left, state.bound) == (0, 0.0, None, None)
    json.dumps(state.to_dict(), allow_nan=False)


def test_a_tally_is_what_is_new() -> None:
    progress = Progress()
    progress.update(tally_of(record({"beer": 0.4}), broken("is empty")))
    assert progress.state().outcomes == {"block": 1, "error": 1}


class Watched(io.StringIO):
    """A file that tells when a number of lines has come."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.come = threading.Event()
        self._lines = lines

    def flush(self) -> None:
        if self.getvalue().count("\n") >= self._lines:
            self.come.set()


def test_json_lines_come_though_nothing_moves() -> None:
    file = Watched(3)
    progress = Progress([JsonProgress(file, every=0.01)], shards=4)
    progress.update(images(3, 1), {"score": 0.5}, shards=1)
    assert file.come.wait(timeout=60)
    progress.close()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert len(lines) >= 4
    assert lines[0]["images"] == lines[-1]["images"] == 4
    assert [line["finished"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[2]["seconds_since_update"] > 0
    last = lines[-1]
    assert last["latentguard"] == "scan"
    assert last["outcomes"] == {"allow": 3, "block": 1}
    assert (last["share_blocked"], last["shards_done"], last["shards"]) == (0.25, 1, 4)
    assert last["bound_by"] == "scoring"


def test_the_last_line_of_an_unfinished_scan_says_so() -> None:
    file = io.StringIO()
    progress = Progress([JsonProgress(file, every=1000)])
    progress.update(images(1))
    progress.close(finished=False)
    (line,) = file.getvalue().splitlines()
    assert json.loads(line)["finished"] is False


def test_metrics_are_served_on_this_machine_alone() -> None:
    pytest.importorskip("prometheus_client", reason="metrics need prometheus_client")
    view = Metrics(0)
    progress = Progress([view], shards=4)
    address = f"http://127.0.0.1:{view.port}/metrics"
    progress.update(tally_of(record({"beer": 0.4}), broken("x")), {"decode": 2.0}, shards=1)
    with urllib.request.urlopen(address, timeout=60) as answer:
        text = answer.read().decode()
    assert 'latentguard_scan_images_total{outcome="block"} 1.0' in text
    assert 'latentguard_scan_images_total{outcome="error"} 1.0' in text
    assert 'latentguard_scan_phase_seconds_total{phase="decoding"} 2.0' in text
    assert "latentguard_scan_shards_done 1.0" in text
    assert "latentguard_scan_shards 4.0" in text
    with pytest.raises(UsageError, match=f"cannot serve metrics at 127.0.0.1:{view.port}"):
        Metrics(view.port)
    progress.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=60)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_says_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    clock = Clock()
    progress = Progress([Bar(file)], shards=4, clock=clock)
    clock.now += 10
    counts = Counter(allow=6, block=3, error=1)
    progress.update(Counts(counts, Counter(allow=6, block=4)), {"score": 9.0}, shards=1)
    assert progress.say("a [red]note\x1b[2J")
    progress.close()
    text = file.getvalue()
    assert "10 images" in text
    assert "4 blocked (40.0 %)" in text
    assert "1 error, shard 1 of 4, 0:00:30 left, bound by scoring" in text
    assert "latentguard: a [red]note\\x1b[2J" in text


def test_no_view_can_say_anything_where_there_is_none() -> None:
    assert not Progress().say("a note")


def test_a_view_is_not_called_for_every_image() -> None:
    seen: list[State] = []

    class View:
        def show(self, state: State) -> None:
            seen.append(state)

        def say(self, note: str) -> bool:
            return False

        def close(self, state: State) -> None:
            seen.append(state)

    clock = Clock()
    progress: Any = Progress([View()], clock=clock)
    for _ in range(1000):
        clock.now += 0.001
        progress.update(images(1))
    progress.close()
    assert len(seen) < 15
    assert seen[-1].images == 1000
    assert seen[-1].finished
