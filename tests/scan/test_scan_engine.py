"""scan_files: order, batches, files that cannot be read, models that do not fit."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_helpers import ALWAYS, NEVER, latents_of, write_latents

from latentguard import load_encoder, scan_files
from latentguard.errors import LatentsError, ModelError, PolicyError
from latentguard.files import ArrayRecord, save_latents
from latentguard.judge import Verdict
from latentguard.policy import load_policy
from latentguard.scan import Scan
from latentguard.scan import judging as judging_module
from latentguard.scan.judging import batches
from latentguard.spaces import SPACES, LatentArray, Latents


def test_one_record_per_image_in_the_order_of_the_paths(tmp_path: Path, calm: Path) -> None:
    b = write_latents(tmp_path / "b.pt", 3, seed=1, ids=["x", "y", "z"])
    a = write_latents(tmp_path / "a.safetensors", 2, seed=2)
    records = list(scan_files([b, a], calm, batch_size=2))
    assert [(r.source, r.index, r.id) for r in records] == [
        (str(b), 0, "x"),
        (str(b), 1, "y"),
        (str(b), 2, "z"),
        (str(a), 0, None),
        (str(a), 1, None),
    ]
    assert {r.verdict.decision for r in records} == {"allow"}
    assert {r.space for r in records} == {"flux2"}
    assert {r.model.name for r in records if r.model} == {"nano-flux2"}


def test_batches_change_no_score_and_sizes_may_mix(tmp_path: Path, calm: Path) -> None:
    paths = [
        write_latents(tmp_path / f"{n}.pt", 2, seed=n, side=side)
        for n, side in enumerate((16, 24, 16, 32))
    ]
    together = list(scan_files(paths, calm, batch_size=8))
    alone = list(scan_files(paths, calm, batch_size=1))
    assert [r.source for r in together] == [r.source for r in alone]
    for one, other in zip(together, alone, strict=True):
        # Sums run in another order in a batch; measured worst 4e-7 in float32.
        assert [c.margin for c in one.verdict.concepts] == pytest.approx(
            [c.margin for c in other.verdict.concepts], abs=1e-5
        )


def test_actions_lead_to_decisions(tmp_path: Path, policy: Callable[..., Path]) -> None:
    file = write_latents(tmp_path / "a.pt", 1)
    for action, decision in (
        ("observe", "allow"),
        ("review", "review"),
        ("steer", "block"),  # nothing can be steered any more
        ("block", "block"),
    ):
        rules = policy(("revolver", action, ALWAYS), ("wine bottle", "block", NEVER))
        (record,) = scan_files(file, rules)
        assert record.verdict.decision == decision
        assert record.leading is not None
        assert record.leading.id == "revolver"
        assert "revolver" in record.verdict.reason


def test_the_leading_concept_is_the_one_that_the_reason_names(
    tmp_path: Path, policy: Callable[..., Path]
) -> None:
    file = write_latents(tmp_path / "a.pt", 4)
    path = policy(
        ("wine bottle", "review", ALWAYS), ("revolver", "block", ALWAYS), ("syringe", "block", -1.9)
    )
    text = path.read_text().replace("action: block\n", "action: block\n    severity: low\n", 1)
    path.write_text(text + "    severity: critical\n")
    for record in scan_files(file, path):
        assert [c.id for c in record.ranked] == ["syringe", "revolver", "wine-bottle"]
        assert "concept 'syringe' matched" in record.verdict.reason


def _bad_files(folder: Path) -> dict[str, Path]:
    """Files that must not be read, by what is wrong with them."""

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {folder / 'executed'}",)

    good = write_latents(folder / "good.pt", 1).read_bytes()
    bad = {
        "pickle": pickle.dumps(Payload()),
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"not a file of latents",
    }
    paths = {}
    for name, data in bad.items():
        paths[name] = folder / f"{name}.pt"
        paths[name].write_bytes(data)
    paths["header"] = folder / "header.safetensors"
    paths["header"].write_bytes((100 << 30).to_bytes(8, "little") + b"{}")
    paths["nan"] = folder / "nan.pt"
    tensor = latents_of(1)
    tensor[0, 3, 2, 1] = float("nan")
    torch.save({"latents": tensor, "space": "flux2", "scaled": True}, paths["nan"])
    paths["channels"] = folder / "channels.npy"
    np.save(paths["channels"], np.zeros((1, 7, 16, 16), np.float32))
    paths["missing"] = folder / "missing.pt"
    paths["glob"] = folder / "nothing-*.pt"
    return paths


def test_bad_files_are_errors_and_the_rest_is_scanned(tmp_path: Path, calm: Path) -> None:
    bad = _bad_files(tmp_path)
    first, last = tmp_path / "good.pt", write_latents(tmp_path / "last.pt", 2)
    records = list(scan_files([first, *bad.values(), last], calm, batch_size=4))
    assert [r.source for r in records if not r.failed] == [str(first), str(last), str(last)]
    failed = [r for r in records if r.failed]
    assert [r.source for r in failed] == [str(path) for path in bad.values()]
    for record in failed:
        assert record.verdict.decision == "block"
        assert record.verdict.error
        assert record.verdict.error in record.verdict.reason
        assert record.verdict.concepts == ()
        assert record.model is None
        assert record.outcome == "error"
    assert not (tmp_path / "executed").exists()


def test_what_cannot_be_read_is_blocked_even_where_errors_are_allowed(
    tmp_path: Path, policy: Callable[..., Path]
) -> None:
    rules = policy(("revolver", "block", NEVER), on_error="allow")
    (record,) = scan_files(tmp_path / "missing.pt", rules)
    assert (record.verdict.decision, record.outcome) == ("block", "error")


class _Failing(torch.nn.Module):
    """A trunk that fails for the images that `broken` names, by their first number."""

    def __init__(self, inner: torch.nn.Module, broken: float) -> None:
        super().__init__()
        self.inner = inner
        self.broken = broken

    def feature_map(self, latents: torch.Tensor) -> torch.Tensor:
        if bool((latents[:, 0, 0, 0] == self.broken).any()):
            raise RuntimeError("out of something\nwith details")
        return self.inner.feature_map(latents)  # type: ignore[operator, no-any-return]

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize(("on_error", "decision"), [("block", "block"), ("review", "review")])
def test_an_image_that_fails_while_scored_fails_alone(
    tmp_path: Path, policy: Callable[..., Path], on_error: str, decision: str
) -> None:
    tensor = latents_of(4)
    tensor[2, 0, 0, 0] = 1.25
    file = tmp_path / "a.pt"
    save_latents(file, Latents(tensor, "flux2", True))
    encoder = load_encoder("nano-flux2")
    encoder.net = _Failing(encoder.net, 1.25)  # type: ignore[attr-defined]
    rules = policy(("revolver", "review", NEVER), on_error=on_error)
    records = list(scan_files(file, rules, encoder))
    assert [r.failed for r in records] == [False, False, True, False]
    assert records[2].verdict.decision == decision
    assert records[2].verdict.error == "RuntimeError: out of something"
    assert records[2].outcome == "error"


def test_a_space_without_a_model_is_an_error_of_its_images(tmp_path: Path, calm: Path) -> None:
    file = tmp_path / "sana.pt"
    save_latents(file, Latents(latents_of(2, channels=32), "sana", True))
    good = write_latents(tmp_path / "flux2.pt", 1)
    run = Scan([file, good], calm)
    records = list(run)
    assert [r.failed for r in records] == [True, True, False]
    assert "sana" in str(records[0].verdict.error)
    assert records[0].space == "sana"
    assert [m.id.name for m in run.models] == ["nano-flux2"]


def test_auto_takes_one_model_per_space(tmp_path: Path, calm: Path) -> None:
    flux2 = write_latents(tmp_path / "flux2.pt", 1)
    sdxl = tmp_path / "sdxl.pt"
    save_latents(sdxl, Latents(latents_of(1, channels=4, side=64), "sdxl", True))
    run = Scan([sdxl, flux2, sdxl], calm, batch_size=3)
    records = list(run)
    assert [r.space for r in records] == ["sdxl", "flux2", "sdxl"]
    assert [r.failed for r in records] == [False, False, False]
    assert {m.space for m in run.models} == {"flux2", "sdxl"}
    assert len(run.models) == 2


def test_a_named_model_makes_other_spaces_errors(tmp_path: Path, calm: Path) -> None:
    sdxl = tmp_path / "sdxl.pt"
    save_latents(sdxl, Latents(latents_of(1, channels=4, side=64), "sdxl", True))
    flux2 = write_latents(tmp_path / "flux2.pt", 1)
    records = list(scan_files([sdxl, flux2], calm, "nano-flux2"))
    assert [r.failed for r in records] == [True, False]
    assert records[0].verdict.decision == "block"
    assert records[0].verdict.error == "model nano-flux2 reads flux2 latents, not sdxl"


def test_auto_takes_the_model_that_the_policy_names(tmp_path: Path, calm: Path) -> None:
    calm.write_text(calm.read_text().replace("name: made", "name: made\nmodel: nano-sdxl"))
    sdxl = tmp_path / "sdxl.pt"
    save_latents(sdxl, Latents(latents_of(1, channels=4, side=64), "sdxl", True))
    run = Scan([sdxl, write_latents(tmp_path / "flux2.pt", 1)], calm)
    records = list(run)
    assert [r.failed for r in records] == [False, True]
    assert records[1].verdict.error == "model nano-sdxl reads sdxl latents, not flux2"
    assert [m.id.name for m in run.models] == ["nano-sdxl"]
    (other,) = scan_files(tmp_path / "flux2.pt", calm, "nano-flux2")  # what is asked for goes first
    assert not other.failed


def test_nano_view_is_loaded_for_each_space_that_has_a_view(tmp_path: Path, calm: Path) -> None:
    files = []
    for space, channels in (("sd1", 4), ("wan21", 16), ("sana", 32)):
        files.append(tmp_path / f"{space}.pt")
        save_latents(files[-1], Latents(latents_of(1, channels=channels, side=64), space, True))
    for model in ("auto", "nano-view"):
        run = Scan(files, calm, model)
        records = {record.space: record for record in run}
        assert [records[name].failed for name in ("sd1", "wan21", "sana")] == [False, False, True]
        assert {(m.id.name, m.space) for m in run.models} == {
            ("nano-view", "sd1"),
            ("nano-view", "wan21"),
        }
        assert records["sana"].verdict.decision == "block"
    assert "space sana has none that is fine enough" in str(records["sana"].verdict.error)


def test_a_policy_of_one_space_makes_others_errors(tmp_path: Path, calm: Path) -> None:
    text = calm.read_text().replace("name: made", "name: made\nspace: sdxl")
    calm.write_text(text)
    (record,) = scan_files(write_latents(tmp_path / "a.pt", 1), calm)
    assert record.verdict.error == "policy 'made' is written for sdxl, not flux2"


def test_wrong_options_raise_at_once(tmp_path: Path, calm: Path) -> None:
    file = write_latents(tmp_path / "a.pt", 1)
    with pytest.raises(PolicyError):
        scan_files(file, "no-such-policy")
    with pytest.raises(ModelError, match="no-such-model"):
        scan_files(file, calm, "no-such-model")
    with pytest.raises(ModelError, match="reads flux2 latents, not sdxl"):
        scan_files(file, calm, "nano-flux2", space="sdxl")
    with pytest.raises(LatentsError, match="sdxxl"):
        scan_files(file, calm, space="sdxxl")
    with pytest.raises(ModelError, match="device 'tpu9000' cannot be used"):
        scan_files(file, calm, device="tpu9000")
    with pytest.raises(ValueError, match="batch_size"):
        scan_files(file, calm, batch_size=0)


def test_concepts_that_the_model_cannot_see(tmp_path: Path, policy: Callable[..., Path]) -> None:
    file = write_latents(tmp_path / "a.pt", 1)
    concepts = (("revolver", "block", NEVER), ("nazi rally", "block", ALWAYS))
    strict = policy(*concepts, name="strict", uncovered="error")
    with pytest.raises(ModelError, match="nazi-rally"):
        list(scan_files(file, strict))
    run = Scan(file, policy(*concepts, name="lenient", uncovered="warn"))
    (record,) = run
    assert record.verdict.decision == "allow"
    assert "not visible to this model" in record.verdict.reason
    assert run.models[0].uncovered == ("nazi-rally",)
    assert [c.covered for c in record.ranked] == [True, False]
    assert run.models[0].notes


def test_a_threshold_without_calibration_is_an_error_of_the_policy(
    tmp_path: Path, calm: Path
) -> None:
    calm.write_text(calm.read_text().replace("{margin: 2.0}", "{fpr: 0.01}", 1))
    with pytest.raises(PolicyError, match="no lock file"):
        list(scan_files(write_latents(tmp_path / "a.pt", 1), calm))


def test_previews_and_heat_maps_on_request(tmp_path: Path, calm: Path) -> None:
    file = write_latents(tmp_path / "a.pt", 2, side=32)
    (plain, _) = scan_files(file, calm)
    assert plain.preview is None
    assert plain.heatmaps is None
    record, _ = scan_files(file, calm, previews=True, heatmaps=True)
    assert record.preview is not None
    assert record.preview.shape == (32, 32, 3)
    assert record.preview.dtype == np.uint8
    assert record.heatmaps is not None
    assert set(record.heatmaps) == {"revolver", "wine-bottle"}
    grids = {heat.shape for heat in record.heatmaps.values()}
    assert len(grids) == 1
    assert all(np.isfinite(heat).all() for heat in record.heatmaps.values())
    assert record.size == (32, 32)


def test_records_are_written_as_they_come(tmp_path: Path, calm: Path) -> None:
    """A scan reads no more than a batch ahead of what it has given."""
    good = write_latents(tmp_path / "a.pt", 4)

    def paths() -> object:
        yield good
        raise AssertionError("read ahead")

    records = scan_files(paths(), calm, batch_size=2)  # type: ignore[arg-type]
    assert [next(records).index for _ in range(4)] == [0, 1, 2, 3]


def test_large_latents_make_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging_module, "MAX_CELLS", 3 * 32 * 16 * 16)
    image = LatentArray(latents_of(1).numpy(), SPACES["flux2"], True)
    records = [ArrayRecord("a", n, None, image, None) for n in range(7)]
    records[3] = ArrayRecord("a", 3, None, None, "broken")
    assert [len(batch) for batch in batches(records, 16)] == [4, 3]
    assert [len(batch) for batch in batches(records, 2)] == [2, 2, 2, 1]


def test_a_record_as_json_is_a_verdict_again(tmp_path: Path, calm: Path) -> None:
    (record,) = scan_files(write_latents(tmp_path / "a.pt", 1, ids=["one"]), calm)
    data = record.to_dict()
    assert Verdict.from_dict(data) == record.verdict
    rules = load_policy(calm)
    assert data["policy"] == {"name": "made", "version": "7", "sha256": rules.sha256}
    assert set(data["model"]) == {"name", "sha256"}


def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys, latentguard.scan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
