"""Batches that are judged side by side: the same records, in the same order, whoever is first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_helpers import member, npy, options_of, records_of, scan_run, write_shards

from latentguard.errors import PolicyError
from latentguard.judge import Judged
from latentguard.scan import judges as rooms
from latentguard.scan.judges import Judges, SpaceJudge
from latentguard.scan.judging import Judging
from latentguard.scan.local import run_local
from latentguard.scan.run import open_run
from latentguard.spaces import LatentArray

pytest.importorskip(
    "onnxruntime", reason="needs pip install 'latentguard[onnx]', which the dev extra has"
)
pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


class Watched(Judges):
    """Judges in lanes. Each batch does something first; the most that are judged at once count."""

    def __init__(self, inner: Judges, lanes: int, first: Callable[[int], None]) -> None:
        super().__init__(inner.rules)
        self._inner, self._first, self.lanes = inner, first, lanes
        self.models, self.notes = inner.models, inner.notes
        self._lock = threading.Lock()
        self.begun = self.running = self.most = 0

    def of(self, space: str) -> SpaceJudge | str:
        found = self._inner.of(space)
        if isinstance(found, str):
            return found

        def judge(latents: LatentArray, heatmaps: bool) -> Judged:
            with self._lock:
                number, self.begun, self.running = self.begun, self.begun + 1, self.running + 1
                self.most = max(self.most, self.running)
            try:
                self._first(number)
                return found.judge(latents, heatmaps)
            finally:
                with self._lock:
                    self.running -= 1

        return replace(found, judge=judge)


def in_lanes(
    place: Path, policy: Path, paths: list[Path], judges: Watched, **how: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a run as they are stored, and the ids in the order in which they were told."""
    options = options_of(policy, runtime="onnx", batch_size=2)
    run = open_run(str(place), options, judges, [str(path) for path in paths])
    order: list[str] = []
    run_local(
        run,
        Judging(judges),
        workers=2,
        told=lambda records: order.extend(str(record.id) for record in records),
        **how,
    )
    return records_of(run), order


@pytest.mark.parametrize("max_memory", [1, 256 << 20])
def test_a_slow_batch_is_overtaken_and_its_records_are_not(
    tmp_path: Path, calm: Path, max_memory: int
) -> None:
    paths = write_shards(tmp_path / "in", 4, 7)
    with paths[1].open("ab") as file:
        file.write(b"damage" * 2000)
    options = options_of(calm, runtime="onnx", batch_size=2)
    alone = records_of(scan_run(tmp_path / "alone", options, paths))
    judges = Watched(options.judges(lanes=3), 3, lambda n: time.sleep(0.5 * (n % 3 == 0)))
    records, told = in_lanes(tmp_path / "lanes", calm, paths, judges, max_memory=max_memory)
    assert records == alone
    assert judges.most == (1 if max_memory == 1 else 3)
    for path in paths:
        own = [str(r["id"]) for r in alone if r["source"].startswith(str(path))]
        assert [name for name in told if name in own] == own


def test_a_batch_that_ends_the_run_ends_it(tmp_path: Path, calm: Path) -> None:
    paths = write_shards(tmp_path / "in", 3, 6)
    options = options_of(calm, runtime="onnx", batch_size=2)

    class Lacking(Watched):
        def of(self, space: str) -> SpaceJudge | str:
            if self.begun >= 4:
                raise PolicyError("lacks a threshold")
            return super().of(space)

    judges = Lacking(options.judges(lanes=2), 2, lambda n: None)
    with pytest.raises(PolicyError, match="lacks a threshold"):
        in_lanes(tmp_path / "run", calm, paths, judges)
    assert threading.active_count() < 10
    records = records_of(scan_run(tmp_path / "run", options, resume=True))
    assert len({(r["source"], r["id"]) for r in records}) == len(records) == 18


def test_an_image_that_fails_in_its_lane_is_an_error_of_its_own(tmp_path: Path, calm: Path) -> None:
    import tarfile

    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for n, array in enumerate(latents_with_one_too_large()):
            member(f"{n}.latent.npy", npy(array), tar)
            member(f"{n}.json", b'{"space": "flux2", "scaled": true}', tar)
    options = options_of(calm, runtime="onnx", batch_size=2)
    judges = Watched(options.judges(lanes=3), 3, lambda n: None)
    records, _ = in_lanes(tmp_path / "run", calm, [path], judges)
    assert [r["error"] is not None for r in records] == [n == 5 for n in range(9)]


def latents_with_one_too_large() -> Any:
    from scan_helpers import latents_of

    latents = latents_of(9, 1).float().numpy()
    latents[5, 0, 0, 0] = 1e8
    return latents


@pytest.mark.parametrize(
    ("said", "lanes", "threads"), [("1", 1, 1), ("2", 2, 1), ("6", 4, 1), ("16", 4, 4)]
)
def test_lanes_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, said: str, lanes: int, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert rooms.default_lanes() == lanes
    assert rooms._threads(lanes) == threads
