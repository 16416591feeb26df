"""A policy with a cascade as two files: what is written, swapped and refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exported import SECOND, by_first, photos, second, two_stages

from latentguard.encoders import checkpoint
from latentguard.errors import ModelError
from latentguard.export import Exported, export_onnx, export_triton, swap_policy, write
from latentguard.policy import Policy
from latentguard.runtime import Guard
from latentguard.runtime.artifact import METADATA
from latentguard.scorer import Scorer

pytestmark = pytest.mark.slow
"""Exports of two models, or of one that is traced anew; judge and guard have cascades in short."""


def metadata(path: Path) -> dict[str, Any]:
    entries = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    found: dict[str, Any] = json.loads(entries[METADATA])
    return found


def judged(guard: Guard) -> list[tuple[str, bool]]:
    return [(v.decision, by_first(v)) for v in guard.scan(photos().tensor.float().numpy())]


def expected(policy: Policy) -> list[tuple[str, bool]]:
    return [(v.decision, by_first(v)) for v in Scorer(policy, second()).verdicts(photos())]


def test_two_files(cascade: Exported) -> None:
    first = cascade.first
    assert first is not None
    assert (cascade.path.name, first.path.name) == ("guard.onnx", "guard.first.onnx")
    for made in (cascade, first):
        assert made.sha256 == hashlib.sha256(made.path.read_bytes()).hexdigest()
        assert made.bytes == made.path.stat().st_size
        assert (made.checked.images, made.checked.same_decisions) == (25, 25)
    ours, theirs = metadata(cascade.path), metadata(first.path)
    assert ours["first"] == {"file": "guard.first.onnx", "sha256": first.sha256}
    assert ours["policy"] == json.loads(json.dumps(two_stages().to_dict()))
    assert theirs["first"] is theirs["policy"]["cascade"] is None
    assert theirs["model"]["name"] == "nano-flux2"
    assert (ours["precision"], theirs["precision"]) == ("fp32", "fp32")


def test_the_check_is_of_the_whole_cascade(cascade: Exported) -> None:
    assert cascade.first is not None
    assert cascade.first.checked.escalated is None
    with Guard(cascade.path) as guard:
        found = judged(guard)
    assert cascade.checked.escalated == [by for _, by in found].count(False)
    assert 0 < cascade.checked.escalated < 25


@pytest.mark.parametrize(
    ("first", "kinds"),
    [
        pytest.param(None, ("int8", "int8"), marks=pytest.mark.slow),
        ("fp32", ("int8", "fp32")),
    ],
)
def test_precisions(first: Any, kinds: tuple[str, str], tmp_path: Path) -> None:
    """Both files have that of `precision`, unless the first is given its own."""
    made = export_onnx(
        *(two_stages(), second(), tmp_path / "a.onnx"),
        size=(32, 32),
        precision="int8-dynamic",
        first_precision=first,
        check=photos()[:2],  # all of them below
    )
    assert made.first is not None
    found = [metadata(one.path)["precision"].split("-")[0] for one in (made, made.first)]
    assert tuple(found) == kinds
    # 8 bits move margins by less than what the first model's distances to `unsure` leave room for
    # in most images; what is decided by nano-flux2 is decided the same.
    with Guard(made.path, made.sha256) as guard:
        pairs = list(zip(judged(guard), expected(two_stages()), strict=True))
    assert sum(ours[1] == theirs[1] for ours, theirs in pairs) >= 22
    assert all(ours == theirs for ours, theirs in pairs if ours[1] and theirs[1])


def test_a_swap_changes_both_files(cascade: Exported, tmp_path: Path) -> None:
    policy = two_stages(0.3, guns=0.4)
    digest = swap_policy(cascade.path, policy, tmp_path / "b.onnx", second(), sha256=cascade.sha256)
    assert {path.name for path in tmp_path.iterdir()} == {"b.onnx", "b.first.onnx"}
    with Guard(tmp_path / "b.onnx", digest) as guard:
        assert judged(guard) == expected(policy)
    # There and back.
    back = swap_policy(tmp_path / "b.onnx", two_stages(), tmp_path / "b.onnx", second())
    again = swap_policy(cascade.path, two_stages(), tmp_path / "c.onnx", second())
    with Guard(tmp_path / "b.onnx", back) as guard:
        assert judged(guard) == expected(two_stages())
    assert metadata(tmp_path / "c.onnx")["first"]["sha256"] == cascade.first.sha256  # type: ignore[union-attr]
    assert again != cascade.sha256  # it names another file


def test_a_swap_takes_a_cascade_away_but_adds_none(cascade: Exported, tmp_path: Path) -> None:
    alone = tmp_path / "alone.onnx"
    swap_policy(cascade.path, two_stages(None), alone, second())
    assert [path.name for path in tmp_path.iterdir()] == ["alone.onnx"]
    with Guard(alone) as guard:
        assert guard.first_model is None
        assert judged(guard) == expected(two_stages(None))
    with pytest.raises(ModelError, match=r"alone.onnx: has no first model, which policy 'two-sta"):
        swap_policy(alone, two_stages(), tmp_path / "b.onnx", second())
    assert [path.name for path in tmp_path.iterdir()] == ["alone.onnx"]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another first model of the same space, as a file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=generator) * 0.1
        for key, shape in checkpoint.expected_shapes(SECOND).items()
    } | {"logit_scale": torch.tensor(4.0)}
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "other.safetensors"
    checkpoint.write(path, checkpoint.convert(checkpoint.Weights(tensors, SECOND, "other", "", "")))
    return path


def test_a_swap_to_another_first_model(cascade: Exported, other: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"first.onnx: was exported from nano-flux2 .* of other"):
        swap_policy(cascade.path, two_stages(first=str(other)), tmp_path / "b.onnx", second())
    assert not (tmp_path / "b.onnx").exists()


def test_triton_serves_no_cascade(cascade: Exported, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds a cascade.*policy without `cascade`"):
        export_triton(cascade.path, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_refused_before_tracing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "trace", lambda *_: pytest.fail("traced"))
    options: dict[str, Any] = {"size": (32, 32)}
    with pytest.raises(ModelError, match="must have a name of letters, digits"):
        export_onnx(two_stages(), second(), tmp_path / "my guard.onnx", **options)
    with pytest.raises(ModelError, match="policy 'two-stages' has no cascade"):
        export_onnx(
            two_stages(None), second(), tmp_path / "a.onnx", first_precision="int8", **options
        )
    with pytest.raises(ModelError, match="int8 needs latents to calibrate on"):
        export_onnx(two_stages(), second(), tmp_path / "a.onnx", first_precision="int8", **options)
    assert list(tmp_path.iterdir()) == []


def test_crops_behind_a_first_model_that_reads_whole_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has views: crops and a cascade.*export it with one of"):
        export_onnx(two_stages().with_views("crops"), "nano-flux2", tmp_path / "guard.onnx")
    assert not list(tmp_path.iterdir())


def test_a_first_model_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(write.LARGEST, "fp32", 1e-12)
    with pytest.raises(ModelError, match=r"a\.first\.onnx: not written, as its margins differ"):
        export_onnx(two_stages(), second(), tmp_path / "a.onnx", size=(32, 32))
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    command: Callable[..., Any], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "bundled", lambda space: photos()[:2])
    policy, out = tmp_path / "two.yaml", tmp_path / "guard.onnx"
    policy.write_text(
        "schema_version: 1\nname: two\nversion: '1'\ncontrast: [dog]\n"
        "cascade: {first: nano-flux2, unsure: 0.1}\nconcepts:\n"
        "  - {id: guns, category: guns, prompts: [revolver], threshold: {margin: 0.1}, "
        "action: block}\n"
    )
    arguments = ("--policy", policy, "--model", other, "--height", 32, "--width", 32, "-o", out)
    ran = command("export", "onnx", *arguments, "--first-precision", "int8")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("first model: compared with PyTorch on 2 real latents")
    assert "; the first model passed on" in lines[1]
    assert lines[2].startswith(f"wrote {out.with_suffix('.first.onnx')} (")
    assert lines[-1] == f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}"
    assert metadata(out.with_suffix(".first.onnx"))["precision"] == "int8-dynamic"
    assert metadata(out)["precision"] == "fp32"
    ran = command("export", "swap", out, "--policy", policy, "--model", other, "--quiet")
    assert ran.code == 0, ran.err
    with Guard(out, ran.out.strip()) as guard:
        assert guard.first_model is not None
