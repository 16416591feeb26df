"""Runs of a sample: the same images as a plain scan draws, whoever scans them and after a crash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray_helpers import assert_same, needs_ray, on_its_own, ray_run
from run_helpers import options_of, records_of, scan_run, write_shard

from latentguard.errors import UsageError
from latentguard.scan import Scan
from latentguard.scan import shard as shard_module
from latentguard.scan.estimates import sentences
from latentguard.scan.parts import collect
from latentguard.scan.run import Run
from latentguard.scan.sampling import Cluster, ClusterSample, Draw, SamplePlan

pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)

SIZES = (2, 5, 8, 1, 6, 3, 7)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Of several sizes, one of which cannot be read."""
    folder = tmp_path / "shards"
    folder.mkdir()
    made = [write_shard(folder / f"{n}.tar", size, n) for n, size in enumerate(SIZES)]
    bad = folder / "bad.tar"
    bad.write_bytes(b"no tar" * 100)
    return [*made, bad]


def _plain(shards: list[Path], policy: Path, draw: Draw) -> tuple[list[Any], ClusterSample]:
    scan = Scan(shards, policy, sample=draw.images, sample_shards=draw.spread, seed=draw.seed)
    records = [record.to_dict() for record in scan]
    assert scan.drawn is not None
    return records, scan.drawn


def _in_order_of_draw(run: Run) -> list[Any]:
    parts = {str(shard.files[0]): [] for shard in run.wanted}
    for row in records_of(run):
        parts[row["source"].partition("::")[0]].append(row)
    return [row for rows in parts.values() for row in rows]


def _without_scores(rows: list[Any]) -> list[Any]:
    """Batches are others, and so the last digits of scores."""
    return [(row["source"], row["index"], row["id"], row["decision"], row["error"]) for row in rows]


@pytest.mark.parametrize(
    ("draw", "workers"),
    [
        (Draw(12, 4, 1), 0),
        (Draw(12, 4, 2), 2),
        (Draw(15, 3, 0), 1),  # which three shards do not hold
        (Draw(500, 2, 0), 0),
        (Draw(1, 5, 3), 0),
    ],
)
def test_a_run_draws_what_a_plain_scan_draws(
    tmp_path: Path, calm: Path, shards: list[Path], draw: Draw, workers: int
) -> None:
    run = scan_run(tmp_path / "run", options_of(calm, sample=draw), shards, workers)
    records, sample = _plain(shards, calm, draw)
    assert _without_scores(_in_order_of_draw(run)) == _without_scores(records)
    assert run.sample == sample
    assert run.pending() == []
    assert collect([tmp_path / "run"]).tally.sample == sample


def test_a_sample_goes_on(tmp_path: Path, calm: Path, shards: list[Path]) -> None:
    options = options_of(calm, sample=Draw(15, 3, 0))
    whole = scan_run(tmp_path / "whole", options, shards)
    run = scan_run(tmp_path / "run", options, shards)
    first, *_, last = run.wanted
    for shard in (first, last):
        (tmp_path / "run" / "manifest" / f"{shard.number:06d}.json").unlink()
    again = scan_run(tmp_path / "run", options, [], 1, resume=True)
    assert records_of(again) == records_of(whole)
    assert again.sample == whole.sample
    for other in (None, Draw(15, 3, 1), Draw(16, 3, 0), Draw(15, 4, 0)):
        with pytest.raises(UsageError, match="was begun with sample"):
            scan_run(tmp_path / "run", options_of(calm, sample=other), shards, resume=True)


def test_a_shard_that_changes_between_its_two_readings_is_an_error(
    tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "a.tar", 6)
    images, turns = shard_module._images, Counter[str]()

    def read(*arguments: Any) -> Any:
        yield from images(*arguments)
        if not turns["changed"]:
            turns["changed"] += 1
            write_shard(shard, 6, seed=9)

    monkeypatch.setattr(shard_module, "_images", read)
    options = options_of(calm, sample=Draw(3, 1, 0))
    run = scan_run(tmp_path / "run", options, [shard])
    assert [row["error"] for row in records_of(run)][-1] == (
        "changed while it was read: scan it again"
    )
    again = scan_run(tmp_path / "run", options, [shard], resume=True)
    assert (len(records_of(again)), again.errors) == (3, 0)


def test_what_cannot_be_read_is_one_image(tmp_path: Path, calm: Path, shards: list[Path]) -> None:
    run = scan_run(tmp_path / "run", options_of(calm, sample=Draw(100, 8)), shards)
    assert run.sample is not None
    assert run.sample.clusters[str(shards[-1])] == Cluster(1, Counter(error=1))
    assert run.sample.size == sum(SIZES) + 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 40), st.integers(1, 9))
def test_the_first_shards_are_as_few_as_can_be(sizes: list[int], images: int, spread: int) -> None:
    plan = SamplePlan.of(map(str, range(len(sizes))), images, 0, spread)
    looked_at: dict[str, int] = {}
    while len(looked_at) < (count := plan.first(looked_at)):
        for name in plan.shards[:count]:
            looked_at[name] = min(plan.rows, sizes[int(name)])
    seen = [looked_at[name] for name in plan.shards[:count]]
    assert count == len(sizes) or plan.enough(count, sum(seen))
    assert count == plan.spread or not plan.enough(count - 1, sum(seen[:-1]))


def test_the_command_estimates(
    tmp_path: Path, calm: Path, shards: list[Path], command: Any
) -> None:
    run, draw = tmp_path / "run", ("--sample", 12, "--sample-shards", 4, "--seed", 1)
    given = ("scan", tmp_path / "shards", "--policy", calm, "--run", run, "--workers", 0)
    ran = command(*given, *draw)
    _, sample = _plain(sorted(shards), calm, Draw(12, 4, 1))
    assert "\n".join(sentences(sample)) in ran.out
    done = len(sample.clusters)
    assert f"{done} of {done} shards are done" in ran.out
    assert command(*given, *draw, "--resume").out == ran.out
    page = tmp_path / "page.html"
    assert command("scan", "report", run, "-o", page).code == 0
    assert "A random sample of the whole" in page.read_text()


@needs_ray
@pytest.mark.slow
def test_both_engines_draw_the_same(
    tmp_path: Path, calm: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_its_own(monkeypatch)
    options = options_of(calm, batch_size=2, sample=Draw(15, 3, 0))
    run = ray_run(tmp_path / "run", options, shards)
    assert_same(run, scan_run(tmp_path / "whole", options, shards))
