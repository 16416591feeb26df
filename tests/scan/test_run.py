"""Runs of many shards: the same records as a plain scan, once each, whatever was there before."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import (
    SAID,
    member,
    npy,
    options_of,
    plain,
    records_of,
    scan_run,
    write_shard,
    write_shards,
)
from scan_helpers import ALWAYS, HOSTILE, NEVER, latents_of, write_latents

from latentguard import scan_files
from latentguard.errors import TooManyErrorsError, UsageError
from latentguard.files import Reading
from latentguard.judge import ConceptScore, PolicyId, Verdict
from latentguard.scan import ScanRecord
from latentguard.scan.options import RunOptions
from latentguard.scan.schema import Numbering, from_row, to_batch
from latentguard.scan.shard import plan

pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


def _files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sink", ["parquet", "json"])
def test_a_run_says_what_a_plain_scan_says(tmp_path: Path, calm: Path, sink: Any) -> None:
    shards = write_shards(tmp_path / "shards")
    run = scan_run(tmp_path / "run", options_of(calm, sink=sink), shards)
    assert records_of(run) == plain(shards, calm)


def test_readers_give_the_same_records(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", count=5)
    options = options_of(calm, batch_size=2)
    alone = scan_run(tmp_path / "alone", options, shards)
    # Less memory than two batches have.
    run = scan_run(tmp_path / "run", options, shards, workers=2, max_memory=40_000)
    assert records_of(run) == records_of(alone)
    # Which reader was first makes no difference to a single byte of the parts.
    assert [run.done[n].part for n in range(3)] == [alone.done[n].part for n in range(3)]


def test_small_files_share_a_shard(tmp_path: Path, calm: Path) -> None:
    small = [write_latents(tmp_path / f"{n}.safetensors", 2, seed=n) for n in range(3)]
    shard = write_shard(tmp_path / "4.tar")
    run = scan_run(tmp_path / "run", options_of(calm), [*small, shard, small[0]])
    assert [len(shard.files) for shard in run.shards] == [3, 1, 1]
    together = [r.to_dict() for r in scan_files(small, calm)]
    assert records_of(run)[:6] == together
    assert set(run.done[0].states) == set(map(str, small))


def test_what_cannot_be_read_is_in_the_quarantine(tmp_path: Path, calm: Path) -> None:
    good = write_shard(tmp_path / "good.tar")
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"nothing of a tar" * 100)
    missing = tmp_path / "missing.tar"
    run = scan_run(tmp_path / "run", options_of(calm), [bad, missing, good])
    assert [run.done[n].decisions["block"] for n in range(3)] == [1, 1, 0]
    assert [run.done[n].errors for n in range(3)] == [1, 1, 0]
    quarantine = run.done[0].quarantine
    assert quarantine is not None
    (line,) = (tmp_path / "run" / quarantine.name).read_text().splitlines()
    said = json.loads(line)
    assert said["source"] == str(bad)
    assert "is not a tar archive" in said["error"]
    assert run.done[2].quarantine is None
    assert records_of(run) == plain([bad, missing, good], calm)


def test_errors_are_bounded(tmp_path: Path, calm: Path) -> None:
    bad = [tmp_path / f"{n}.tar" for n in range(4)]
    for path in bad:
        path.write_bytes(b"no tar" * 100)
    options = options_of(calm)
    with pytest.raises(TooManyErrorsError, match="stopped: 2 images or files"):
        scan_run(tmp_path / "run", options, bad, max_errors=1)
    run = scan_run(tmp_path / "run", options, bad, resume=True, max_errors=4)
    assert run.errors == 4


def test_keys_that_come_twice_keep_both_records(tmp_path: Path, calm: Path) -> None:
    from pyarrow import parquet

    shard = write_shard(tmp_path / "a.tar", 4, keys=["one", "two", "one", "sub/x.y"])
    run = scan_run(tmp_path / "run", options_of(calm), [shard])
    table = parquet.read_table(tmp_path / "run" / run.done[0].part.name)
    assert table["__key__"].to_pylist() == ["one", "two", "one", "sub/x"]
    assert table["occurrence"].to_pylist() == [0, 0, 1, 0]
    assert table["index"].to_pylist() == [0, 1, 2, 3]
    assert len({json.dumps(margin) for margin in table["concepts"].to_pylist()}) == 4


def test_hostile_names_survive_both_sinks(tmp_path: Path, calm: Path) -> None:
    file = write_latents(tmp_path / "a.safetensors", 3, ids=["plain", "nul\0", "right\u202eleft"])
    for sink in ("parquet", "json"):
        run = scan_run(tmp_path / sink, options_of(calm, sink=sink), [file])
        assert records_of(run) == plain([file], calm)
    (record,) = list(scan_files(write_latents(tmp_path / "b.pt", 1), calm))
    for name in HOSTILE:
        row = Numbering().row(record) | {"id": name}
        (back,) = to_batch([row]).to_pylist()
        expected = name.encode("utf-8", "backslashreplace").decode()  # UTF-8 has no lone surrogates
        assert from_row(back) == {**record.to_dict(), "id": expected}


_TEXT = st.text(max_size=20)


@given(
    texts=st.tuples(_TEXT, st.none() | _TEXT, st.none() | _TEXT, _TEXT),
    numbers=st.tuples(st.floats(-2, 2), st.floats(0, 1), st.floats(-2, 2)),
    kind=st.sampled_from(["probability", "margin", "fpr"]),
    count=st.integers(0, 3),
)
def test_rows_survive_parquet(
    texts: tuple[str, str | None, str | None, str],
    numbers: tuple[float, float, float],
    kind: str,
    count: int,
) -> None:
    source, name, error, prompt = texts
    margin, probability, value = numbers
    threshold: dict[str, str | float] = {"kind": kind, "value": value}
    if kind == "fpr":
        threshold["margin"] = margin
    concept = ConceptScore(
        "a", "b", "block", margin, probability, threshold, prompt, True, False, True, (prompt,)
    )
    verdict = Verdict(1, "block", "why", error, math.inf, (concept,) * count)
    record = ScanRecord(source, 3, name, None, verdict, PolicyId("p", "1", "0"))
    rows = [Numbering().row(record)] * 2
    assert [from_row(row) for row in to_batch(rows).to_pylist()] == [record.to_dict()] * 2
    assert [from_row(json.loads(json.dumps(row))) for row in rows] == [record.to_dict()] * 2


# -- going on --------------------------------------------------------------------------------


def test_a_run_that_is_there_is_not_begun_again(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2, 1)
    options = options_of(calm)
    scan_run(tmp_path / "run", options, shards)
    before = {
        name: (tmp_path / "run" / name).stat().st_mtime_ns for name in _files(tmp_path / "run")
    }
    with pytest.raises(UsageError, match="there is already a run in"):
        scan_run(tmp_path / "run", options, shards)
    run = scan_run(tmp_path / "run", options, shards, resume=True)
    assert run.pending() == []
    assert run.notes == []
    after = {
        name: (tmp_path / "run" / name).stat().st_mtime_ns for name in _files(tmp_path / "run")
    }
    assert before == after


def test_a_run_of_another_version_is_refused(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 1, 1)
    scan_run(tmp_path / "run", options_of(calm), shards)
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    with pytest.raises(
        UsageError, match=r"another version .* is 1, not 2\): continue it with that"
    ):
        scan_run(tmp_path / "run", options_of(calm), shards, resume=True)


def test_another_policy_model_or_option_is_refused(
    tmp_path: Path, calm: Path, policy: Callable[..., Path]
) -> None:
    shards = write_shards(tmp_path / "shards", 2, 1)
    scan_run(tmp_path / "run", options_of(calm, model="nano-flux2"), shards)
    other = policy(("revolver", "block", ALWAYS), name="other")
    sha = r"\(sha256 [0-9a-f]{12}\)"
    for options, words in (
        (
            options_of(other, model="nano-flux2"),
            rf"policy made 7 {sha}, but now it is made 7 {sha}: give the options that it was begun",
        ),
        (options_of(calm, model="nano-sdxl"), rf"model nano-flux2 {sha}, but now it is nano-sdxl"),
        (options_of(calm), rf"model nano-flux2 {sha}, but now it is auto: give"),
        (options_of(calm, model="nano-flux2", views="crops"), "model "),
        (options_of(calm, model="nano-flux2", sink="json"), "sink parquet, but now it is json:"),
        (
            options_of(calm, model="nano-flux2", reading=Reading.of("flux2", True)),
            "space not set, but now it is flux2:",
        ),
    ):
        with pytest.raises(UsageError, match=f"was begun with {words}"):
            scan_run(tmp_path / "run", options, shards, resume=True)
    # How fast is nobody's business.
    same = options_of(calm, model="nano-flux2", batch_size=1, device="cpu")
    assert scan_run(tmp_path / "run", same, shards, resume=True).pending() == []


def test_with_auto_the_model_of_each_space_must_be_the_same(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 2, 1)
    run = scan_run(tmp_path / "run", options_of(calm), shards)
    entry = tmp_path / "run" / "manifest" / "000000.json"
    said = json.loads(entry.read_text())
    said["models"]["flux2"]["sha256"] = "0" * 64  # what a better model, fetched meanwhile, is like
    entry.write_text(json.dumps(said))
    with pytest.raises(
        UsageError, match="had flux2 latents judged by nano-flux2 \\(000000000000\\)"
    ):
        scan_run(tmp_path / "run", run.options, shards, resume=True)


def test_other_files_are_refused(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 3, 1)
    options = options_of(calm)
    scan_run(tmp_path / "run", options, [tmp_path / "shards"])
    assert scan_run(tmp_path / "run", options, resume=True).pending() == []
    with pytest.raises(
        UsageError, match=r"has .*00002\.tar and is of 3 files, the paths given .* 2"
    ):
        scan_run(tmp_path / "run", options, shards[:2], resume=True)
    write_shard(tmp_path / "shards" / "00003.tar", 1)
    with pytest.raises(UsageError, match=r"has not .*00003\.tar"):
        scan_run(tmp_path / "run", options, [tmp_path / "shards"], resume=True)
    with pytest.raises(UsageError, match="in another order"):
        scan_run(tmp_path / "run", options, shards[::-1], resume=True)


def test_what_a_crash_left_is_repaired(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 5, 2)
    options = options_of(calm)
    whole = scan_run(tmp_path / "whole", options, shards)
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    (run / "manifest" / "000000.json").unlink()  # died between part and manifest
    part = run / whole.done[1].part.name
    part.write_bytes(part.read_bytes()[:-10])  # truncated
    (run / whole.done[2].part.name).unlink()
    (run / whole.done[4].tally.name).write_bytes(b"{}")
    (run / "manifest" / "000003.json").write_bytes(b'{"schema_version": 1, "numb')
    (run / "parts" / ".0123.part").write_bytes(b"a temporary of a killed writer")
    again = scan_run(run, options, shards, resume=True)
    assert records_of(again) == records_of(whole)
    assert _files(run) == _files(tmp_path / "whole")
    assert "incomplete and scanned again: 4 shards" in " ".join(again.notes)


def test_a_shard_that_changed_is_named_and_scanned_again(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 3, 2)
    options = options_of(calm)
    scan_run(tmp_path / "run", options, shards)
    write_shard(shards[1], 3, seed=9)
    run = scan_run(tmp_path / "run", options, shards, resume=True)
    (note, *_) = run.notes
    assert str(shards[1]) in note
    assert "changed since it was scanned" in note
    assert records_of(run) == plain(shards, calm)


def test_a_file_that_could_not_be_opened_is_tried_again(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 3, 2)
    options = options_of(calm)
    shards[1].rename(tmp_path / "away")
    run = scan_run(tmp_path / "run", options, shards)
    assert records_of(run) == plain(shards, calm)
    assert run.done[1].errors == 1
    (tmp_path / "away").rename(shards[1])
    run = scan_run(tmp_path / "run", options, shards, resume=True)
    assert records_of(run) == plain(shards, calm)
    assert run.errors == 0
    assert not list((tmp_path / "run" / "quarantine").iterdir())


def test_tasks_share_a_run(tmp_path: Path, calm: Path) -> None:
    shards = write_shards(tmp_path / "shards", 5, 1)
    options = options_of(calm)
    from latentguard.scan.judging import Judging
    from latentguard.scan.local import run_local
    from latentguard.scan.run import open_run

    judges = options.judges()
    place = str(tmp_path / "run")
    # Both are begun before either has done anything.
    opened = [
        open_run(place, options, judges, list(map(str, shards)), resume=True, task=(k, 2))
        for k in range(2)
    ]
    for k, run in enumerate(opened):
        run_local(run, Judging(judges), workers=0)
        assert sorted(run.done) == list(range(k, 5, 2))
    assert records_of(scan_run(place, options, shards, resume=True)) == plain(shards, calm)


# -- copies ----------------------------------------------------------------------------------


def _halved(shards: list[Path], calm: Path, policy: Callable[..., Path]) -> tuple[Path, list[bool]]:
    """A policy that blocks half of the images, and which."""
    margins = [record["concepts"][0]["margin"] for record in plain(shards, calm)]
    threshold = float(np.median(margins))
    return policy(("revolver", "block", threshold), name="half"), [m >= threshold for m in margins]


def _contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


def test_kept_samples_are_copied_with_all_of_their_members(
    tmp_path: Path, calm: Path, policy: Callable[..., Path]
) -> None:
    shards = write_shards(tmp_path / "sh::ards", 2, 4)
    half, blocked = _halved(shards, calm, policy)
    original = {k: v for shard in shards for k, v in _contents(shard).items()}
    copied: dict[str, bytes] = {}
    for keep in ("allow", "block"):
        run = scan_run(tmp_path / keep, options_of(half, keep=keep), shards)
        copies = [entry.kept for entry in run.done.values() if entry.kept]
        found = {k: v for c in copies for k, v in _contents(tmp_path / keep / c.name).items()}
        assert len(found) == 3 * blocked.count(keep == "block")
        assert sum(copy.rows for copy in copies) == blocked.count(keep == "block")
        copied |= found
    assert copied == original


def test_what_was_not_judged_is_not_copied_as_allowed(tmp_path: Path, calm: Path) -> None:
    shard = tmp_path / "a.tar"
    latents = latents_of(4).numpy()
    with tarfile.open(shard, "w") as tar:
        for key, more in (("a", "a.txt"), ("b", "b.other.npy"), ("c", "c.jpg"), ("d", "e.jpg")):
            member(f"{key}.latent.npy", npy(latents[0]), tar)
            member(f"{key}.json", SAID, tar)
            member(more, npy(latents[1]) if more.endswith("npy") else b"x", tar)
    run = scan_run(tmp_path / "run", options_of(calm, keep="allow"), [shard])
    kept = run.done[0].kept
    assert kept is not None
    names = set(_contents(tmp_path / "run" / kept.name))
    assert names == {"a.latent.npy", "a.json", "a.txt", "c.latent.npy", "c.json", "c.jpg", *_d()}
    assert run.done[0].errors == 1


def _d() -> set[str]:
    return {"d.latent.npy", "d.json"}


def test_samples_beside_damage_are_not_copied(tmp_path: Path, calm: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", 5)
    with tarfile.open(shard) as tar:
        members = {m.name: m for m in tar.getmembers()}
    damaged = bytearray(shard.read_bytes())
    at = members["000002.json"].offset
    damaged[at : at + 512] = b"\xff" * 512
    shard.write_bytes(damaged)
    run = scan_run(tmp_path / "run", options_of(calm, keep="allow"), [shard])
    kept = run.done[0].kept
    assert kept is not None
    keys = {name.partition(".")[0] for name in _contents(tmp_path / "run" / kept.name)}
    assert {"000000", "000001", "000004"} <= keys
    assert "000002" not in keys


def test_only_shards_can_be_copied(tmp_path: Path, calm: Path) -> None:
    file = write_latents(tmp_path / "a.safetensors", 1)
    with pytest.raises(UsageError, match=r"a\.safetensors is not one: scan it without --keep"):
        scan_run(tmp_path / "run", options_of(calm, keep="allow"), [file])


# -- options ---------------------------------------------------------------------------------


def test_options_can_be_sent_and_cannot_be_wrong(calm: Path) -> None:
    options = options_of(calm, reading=Reading.of("flux2", True))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        sent = pool.submit(copy.copy, options).result()  # there and back
    assert sent == options
    assert sent.policy.sha256 == options.policy.sha256  # type: ignore[union-attr]
    for wrong in ({"batch_size": 0}, {"sink": "csv"}, {"keep": "steer"}):
        with pytest.raises(UsageError, match="must be"):
            RunOptions(**wrong)  # type: ignore[arg-type]


def test_a_run_is_not_put_where_it_would_be_scanned(tmp_path: Path, calm: Path) -> None:
    write_shards(tmp_path / "shards", 1, 1)
    with pytest.raises(UsageError, match=r"is inside .*shards, which is scanned"):
        scan_run(tmp_path / "shards" / "run", options_of(calm), [tmp_path / "shards"])
    with pytest.raises(UsageError, match="must be a folder"):
        scan_run(tmp_path / "shards" / "00000.tar", options_of(calm), [tmp_path / "shards"])


def test_shards_are_planned_by_size(tmp_path: Path) -> None:
    from latentguard.files import PassedOver
    from latentguard.scan import shard as module

    paths = [tmp_path / f"{n:04d}.npy" for n in range(module.MAX_FILES + 5)]
    for path in paths:
        path.write_bytes(b"x")
    (tmp_path / "note.txt").write_text("hello")
    passed = PassedOver()
    shards = list(plan(tmp_path, passed))
    assert [len(shard.files) for shard in shards] == [module.MAX_FILES, 5]
    assert [name for shard in shards for name in shard.files] == list(map(str, paths))
    assert passed.files == {".txt": 1}
    (error,) = plan(str(tmp_path / "none*.npy"), passed)
    assert error.error == "matches no file"


@pytest.mark.slow
def test_a_missing_extra_names_itself(tmp_path: Path, calm: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from latentguard.cli import main; sys.exit(main())"
    )
    write_shards(tmp_path / "shards", 1, 1)
    given = ["scan", tmp_path / "shards", "--run", tmp_path / "run", "--policy", calm]
    command = [sys.executable, "-c", code, *map(str, given)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "Parquet needs pyarrow, which is not installed: pip install" in ran.stderr
    ran = subprocess.run([*command, "--sink", "json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0


# -- the command -----------------------------------------------------------------------------


def test_the_command_runs_and_goes_on(
    tmp_path: Path, calm: Path, policy: Callable[..., Path], command: Any
) -> None:
    write_shards(tmp_path / "shards", 3, 1)
    (tmp_path / "list.txt").write_text(f"# shards\n{tmp_path}/shards/{{00000..00002}}.tar\n")
    run = ["scan", f"@{tmp_path}/list.txt", "--run", tmp_path / "run", "--policy", calm]
    ran = command(*run, "--workers", 0)
    assert (ran.code, "3 of 3 shards are done" in ran.out) == (0, True)
    assert "3 images: 3 allowed" in ran.out
    assert command(*run).code == 2
    assert command(*run, "--resume").code == 0
    assert command("scan", "--run", tmp_path / "run", "--resume", "--policy", calm).code == 0
    always = policy(("revolver", "review", ALWAYS), ("wine bottle", "block", NEVER), name="always")
    rest = ["--policy", always, "--workers", 0, "--sink", "json"]
    ran = command(
        "scan", tmp_path / "shards", "--run", tmp_path / "b", *rest, "--fail-on", "review"
    )
    assert ran.code == 1
    (tmp_path / "shards" / "bad.tar").write_bytes(b"bad" * 400)
    ran = command("scan", tmp_path / "shards", "--run", tmp_path / "c", *rest)
    assert (ran.code, "1 error" in ran.out) == (3, True)
    ran = command("scan", tmp_path / "shards", "--run", tmp_path / "d", *rest, "--max-errors", 0)
    assert (ran.code, "stopped: 1 images or files" in ran.err) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume"], "--resume belongs to a run: give --run DIR, too"),
        (["--keep", "allow"], "--keep belongs to a run"),
        (["--run", "R", "--format", "json"], "a run writes its records into its folder"),
        (["--run", "R", "--max-memory", "much"], "--max-memory must be a size such as 512MiB"),
        (["--run", "R", "--task", "3/3"], "--task must be K/N with K from 0 to N - 1"),
    ],
)
def test_options_of_a_run(
    tmp_path: Path, calm: Path, command: Any, arguments: list[str], said: str
) -> None:
    arguments = [str(tmp_path / "run") if one == "R" else one for one in arguments]
    ran = command("scan", tmp_path, "--policy", calm, *arguments)
    assert (ran.code, said in ran.err) == (2, True)
