"""A cascade of two files: PyTorch's verdicts, by the same model, and files that do not fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from exported import EXAMPLES, UNSURE, by_first, second, two_stages
from runtime_helpers import MARGIN, run_without_torch, same

from latentguard import Scorer
from latentguard.errors import ModelError
from latentguard.export.metadata import write_metadata
from latentguard.judge import Verdict
from latentguard.runtime import Batching, Guard
from latentguard.runtime.artifact import METADATA
from latentguard.scan import Scan
from latentguard.spaces import Latents

pytestmark = pytest.mark.slow
"""Exports of two models, or of one that is traced anew; judge and guard have cascades in short."""

if TYPE_CHECKING:
    from latentguard.export import Exported

Change = Callable[[dict[str, Any]], object]
SENTENCE = "(by nano-flux2, the first model of the cascade)"


def edit(path: Path, change: Change) -> str:
    """Edit the metadata of a file, as somebody who computes its inner digest anew; its SHA-256."""
    model = onnx.load(path)
    metadata = json.loads(next(e.value for e in model.metadata_props if e.key == METADATA))
    change(metadata)
    data = write_metadata(model, metadata)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def files(cascade: Exported, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of both files, the main one and the first."""
    assert cascade.first is not None
    folder = tmp_path / "copies"
    folder.mkdir()
    main, first = (Path(shutil.copy(file, folder)) for file in (cascade.path, cascade.first.path))
    return main, first


@pytest.fixture(scope="module")
def both(cascade: Exported) -> Guard:
    return Guard(cascade.path, cascade.sha256, threads=1)


@pytest.fixture(scope="module")
def expected(latents: Latents) -> list[Verdict]:
    return Scorer(two_stages(), second(), device="cpu").verdicts(latents)


def test_pytorchs_verdicts_by_the_same_model(
    both: Guard, arrays: np.ndarray, expected: list[Verdict]
) -> None:
    found = both.scan(arrays)
    same(found, expected)
    assert [by_first(v) for v in found] == [by_first(v) for v in expected]
    assert [v.reason.endswith(SENTENCE) for v in found] == [by_first(v) for v in found]
    assert 3 < sum(map(by_first, found)) < 22
    assert {v.decision for v in found if by_first(v)} == {"allow", "review", "block"}
    assert both.model == (second().name, second().sha256)
    assert both.first_model is not None
    assert both.first_model[0] == "nano-flux2"


@pytest.mark.parametrize("unsure", [0, 0.15, 2])
def test_the_second_model_sees_what_the_first_is_unsure_of(
    files: tuple[Path, Path],
    arrays: np.ndarray,
    latents: Latents,
    unsure: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit(files[0], lambda found: found["policy"]["cascade"].update(unsure=unsure))
    guard = Guard(files[0], threads=1)
    seen: list[np.ndarray] = []
    run = guard._main._run
    monkeypatch.setattr(guard._main, "_run", lambda part: seen.append(part) or run(part))
    expected = Scorer(two_stages(unsure), second(), device="cpu").verdicts(latents)
    same(guard.scan(arrays), expected)
    rest = [index for index, verdict in enumerate(expected) if not by_first(verdict)]
    assert len(rest) in {0: (0,), 0.15: range(1, 12), 2: (25,)}[unsure]
    assert len(seen) == bool(rest)
    if seen:
        assert np.array_equal(seen[0], arrays[rest])


def test_scores_are_the_second_models(both: Guard, latents: Latents, arrays: np.ndarray) -> None:
    margins = (
        Scorer(two_stages(None), second(), device="cpu").score(latents).margin.detach().numpy()
    )
    assert np.abs(both.scores(arrays)["margin"] - margins).max() < MARGIN
    assert both.embed(arrays[:2]).shape == (2, 512)


def test_in_the_middle_of_a_generation(both: Guard, latents: Latents, arrays: np.ndarray) -> None:
    scorer = Scorer(two_stages(), second(), device="cpu")
    same(both.scan(arrays, 0.5, final=False), scorer.verdicts(latents, 0.5, final=False))


@pytest.mark.parametrize("batching", [None, Batching(max_batch=8, max_delay_ms=5)])
def test_many_threads_get_the_verdicts_of_their_own_images(
    cascade: Exported, arrays: np.ndarray, expected: list[Verdict], batching: Batching | None
) -> None:
    with (
        Guard(cascade.path, threads=1, batching=batching) as guard,
        ThreadPoolExecutor(16) as pool,
    ):
        jobs = [(n * 7 % 25, 1 + n % 3) for n in range(40)]
        found = pool.map(lambda job: guard.scan(arrays[job[0] : job[0] + job[1]]), jobs)
        for (start, count), verdicts in zip(jobs, found, strict=True):
            same(verdicts, expected[start : start + count])
            told = [by_first(verdict) for verdict in expected[start : start + count]]
            assert [by_first(verdict) for verdict in verdicts] == told


def test_the_same_scan_with_and_without_torch(cascade: Exported) -> None:
    ours = list(Scan(EXAMPLES, model=cascade.path, runtime="onnx", sha256=cascade.sha256))
    theirs = list(Scan(EXAMPLES, two_stages(), second(), device="cpu"))
    same([record.verdict for record in ours], [record.verdict for record in theirs])
    told = [by_first(record.verdict) for record in theirs]
    assert [by_first(record.verdict) for record in ours] == told


def test_a_process_without_torch(
    cascade: Exported, arrays: np.ndarray, expected: list[Verdict], tmp_path: Path
) -> None:
    np.save(tmp_path / "latents.npy", arrays)
    code = (
        "import numpy as np\nfrom latentguard.runtime import Guard\n"
        "for verdict in Guard(sys.argv[1]).scan(np.load(sys.argv[2])):\n"
        "    print(verdict.decision, verdict.reason)"
    )
    ran = run_without_torch(code, cascade.path, tmp_path / "latents.npy")
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [v.decision for v in expected], ran.stderr
    assert [line.endswith(SENTENCE) for line in lines] == [by_first(v) for v in expected]


# -- what goes wrong while it judges ---------------------------------------------------------


def test_what_is_not_finite_is_blocked(both: Guard, arrays: np.ndarray) -> None:
    broken = arrays[:4].copy()
    broken[1, 3, 2, 1], broken[2, 0, 0, 0] = np.nan, np.inf
    found = both.scan(broken)
    for verdict in found[1:3]:
        assert verdict.decision == "block"
        assert "not finite" in str(verdict.error)
    same([found[0], found[3]], both.scan(arrays[[0, 3]]))


@pytest.mark.parametrize("which", ["_first", "_main"])
def test_a_model_that_fails_blocks(
    cascade: Exported, arrays: np.ndarray, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(cascade.path, threads=1)

    def fails(_: np.ndarray) -> Any:
        raise RuntimeError("out of something")

    monkeypatch.setattr(getattr(guard, which), "_run", fails)
    for verdict in guard.scan(arrays):
        assert verdict.decision == "block"
        assert "out of something" in str(verdict.error)


@pytest.mark.parametrize("score", [np.nan, np.inf, 7.0])
def test_scores_that_cannot_be_go_to_the_second_model(
    cascade: Exported, arrays: np.ndarray, score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(cascade.path, threads=1)
    assert guard._first is not None
    run = guard._first._run

    def impossible(array: np.ndarray) -> Any:
        outputs = run(array)
        return outputs | {"margin": np.full_like(outputs["margin"], score)}

    monkeypatch.setattr(guard._first, "_run", impossible)
    same(guard.scan(arrays[:5]), list(guard._main.judge(arrays[:5]).verdicts))


# -- files -----------------------------------------------------------------------------------


def refused(main: Path, sha256: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        Guard(main, sha256, threads=1)
    text = str(caught.value)
    assert "guard" in text
    assert "\n" not in text
    return text


def test_the_pin_covers_the_first_file(files: tuple[Path, Path], cascade: Exported) -> None:
    main, first = files
    edit(first, lambda found: found["policy"]["concepts"][0]["threshold"].update(value=0.999))
    assert "guard.first.onnx: does not have the SHA-256 that guard.onnx" in refused(
        main, cascade.sha256
    )
    first.unlink()
    assert "guard.first.onnx: cannot be read: No such file" in refused(main, cascade.sha256)
    shutil.copy(main, first)
    assert "guard.first.onnx: does not have the SHA-256 that guard.onnx" in refused(main)


def test_a_first_file_that_is_no_plain_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    main, first = files
    shutil.move(first, tmp_path / "moved.onnx")
    first.symlink_to(tmp_path / "moved.onnx")
    assert "guard.first.onnx: is a link" in refused(main)
    first.unlink()
    os.mkfifo(first)
    assert "guard.first.onnx: is not a regular file" in refused(main)


def test_a_main_file_may_be_renamed(files: tuple[Path, Path], cascade: Exported) -> None:
    other = files[0].rename(files[0].with_name("other name.onnx"))
    assert Guard(other, cascade.sha256, threads=1).first_model is not None


@pytest.mark.parametrize(
    "name",
    ["../guard.first.onnx", "/etc/passwd", "a/b.onnx", ".hidden", "", "..", "x\0y", "a" * 300],
)
def test_a_first_file_elsewhere(files: tuple[Path, Path], name: str) -> None:
    main, first = files
    shutil.copy(first, first.parent.parent)
    edit(main, lambda found: found["first"].update(file=name))
    assert "must lie beside it under a plain name" in refused(main)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(scaled=False), "has scaled True, and its first model"),
        (lambda found: found.update(height=64, width=64), "has height 32, and its first model"),
        (
            lambda found: found.update(space="sdxl", channels=4, packed_patch=1),
            "has space flux2, and its first model guard.first.onnx sdxl",
        ),
        (
            lambda found: found["policy"]["concepts"][0]["threshold"].update(value=0.999),
            "its first model guard.first.onnx judges by another policy",
        ),
        (
            lambda found: found["policy"].update(on_error="allow"),
            "its first model guard.first.onnx judges by another policy",
        ),
        (
            lambda found: (
                found["policy"].update(cascade={"first": "nano-flux2", "unsure": 0.1}),
                found.update(first={"file": "guard.first.onnx", "sha256": "0" * 64}),
            ),
            "its first model guard.first.onnx judges by another policy",
        ),
        (lambda found: found.update(schema_version=2), "schema_version must be 1, got 2"),
    ],
)
def test_a_first_file_that_does_not_fit(
    files: tuple[Path, Path], change: Change, message: str
) -> None:
    """Both files are edited by somebody who computes every digest anew."""
    main, first = files
    digest = edit(first, change)
    edit(main, lambda found: found["first"].update(sha256=digest))
    assert message in refused(main)


def test_a_first_model_that_does_not_see_everything(files: tuple[Path, Path]) -> None:
    def half_blind(found: dict[str, Any]) -> None:
        found["policy"]["uncovered"] = "warn"
        if found["first"] is None:
            found["covered"] = [True, False]

    digest = edit(files[1], half_blind)
    edit(files[0], half_blind)
    edit(files[0], lambda found: found["first"].update(sha256=digest))
    message = "guard.onnx: policy 'two-stages': cascade.first nano-flux2 cannot see alcohol"
    assert message in refused(files[0])


def test_a_first_model_that_does_not_see_one_prompt(files: tuple[Path, Path]) -> None:
    def partly(found: dict[str, Any]) -> None:
        found["policy"]["uncovered"] = "warn"
        if found["first"] is None:
            found["seen"][0] = False

    digest = edit(files[1], partly)
    edit(files[0], partly)
    edit(files[0], lambda found: found["first"].update(sha256=digest))
    assert "cascade.first nano-flux2 cannot see" in refused(files[0])


@pytest.mark.parametrize(
    "unsure", [-0.1, 2.5, True, "0.1", None, [0.1], 10**400, float(UNSURE) * 100]
)
def test_a_margin_that_is_none(files: tuple[Path, Path], unsure: Any) -> None:
    edit(files[0], lambda found: found["policy"]["cascade"].update(unsure=unsure))
    assert "have no valid cascade" in refused(files[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("first"), "has a cascade, and it names no file"),
        (lambda found: found.update(first=None), "has a cascade, and it names no file"),
        (lambda found: found["policy"].pop("cascade"), "has no cascade, and it names a file"),
        (lambda found: found["policy"].update(cascade=[]), "have no valid cascade"),
        (lambda found: found["first"].pop("sha256"), "have no valid first"),
        (lambda found: found["first"].update(sha256=5), "have no valid first"),
        (lambda found: found["first"].update(more="x"), "have no valid first"),
        (lambda found: found.update(first="guard.first.onnx"), "have no valid first"),
    ],
)
def test_a_cascade_that_is_not_whole(
    files: tuple[Path, Path], change: Change, message: str
) -> None:
    edit(files[0], change)
    assert message in refused(files[0])


def test_the_first_file_is_a_guard_by_itself(
    files: tuple[Path, Path], arrays: np.ndarray, latents: Latents
) -> None:
    guard = Guard(files[1], threads=1)
    assert guard.first_model is None
    same(guard.scan(arrays), Scorer(two_stages(None), "nano-flux2", device="cpu").verdicts(latents))
