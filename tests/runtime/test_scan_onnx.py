"""`latentguard scan --runtime onnx`: the torch engine's records, tables and exit codes."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from runtime_helpers import ROOT, command_without_torch

from latentguard import cli
from latentguard.errors import LatentsError, ModelError, PolicyError
from latentguard.export.metadata import write_metadata
from latentguard.files import save_latents
from latentguard.policy import load_policy
from latentguard.runtime import network
from latentguard.runtime.artifact import METADATA
from latentguard.runtime.network import Network
from latentguard.scan import Scan, ScanRecord, Summary
from latentguard.scan.judges import _providers, make_judges
from latentguard.scan.schema import from_row
from latentguard.spaces import Latents

EXAMPLES = ROOT / "examples" / "latents.pt"
# As between the runtime and PyTorch: measured worst 4.8e-7.
MARGIN = 1e-5
# Of this image two concepts are equally far below their thresholds, to the last digit of a float32
# (probabilities 0.00054222): which of them is said to be the closest is rounding.
TIED = "cat"


@pytest.fixture(scope="module")
def both(artifact: Path) -> tuple[Scan, list[ScanRecord], Scan, list[ScanRecord]]:
    """The bundled latents by either runtime, with previews and heat maps."""
    options: dict[str, Any] = {"previews": True, "heatmaps": True}
    one = Scan(EXAMPLES, "family", "nano-flux2", device="cpu", **options)
    other = Scan(EXAMPLES, model=artifact, runtime="onnx", device="cpu", **options)
    return one, list(one), other, list(other)


def alike(one: Any, other: Any) -> None:
    """Equal data but for the last digits of scores; digits in sentences may be rounded."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if not (key == "reason" and one["id"] == TIED):
                alike(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            alike(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-4)
    elif isinstance(one, str):
        assert digits_out(one) == digits_out(other)
    else:
        assert one == other


def digits_out(text: str) -> str:
    return re.sub(r"\d+\.\d+", "0.0", text)


def test_the_same_records(both: tuple[Scan, list[ScanRecord], Scan, list[ScanRecord]]) -> None:
    _, torch_records, _, onnx_records = both
    assert len(torch_records) == 25
    for one, other in zip(torch_records, onnx_records, strict=True):
        alike(one.to_dict(), other.to_dict())
        assert one.outcome == other.outcome
        if one.id != TIED:
            assert [c.id for c in one.ranked][:2] == [c.id for c in other.ranked][:2]
        assert one.size == other.size
        for a, b in zip(one.verdict.concepts, other.verdict.concepts, strict=True):
            assert a.margin == pytest.approx(b.margin, abs=MARGIN)


def test_the_same_pictures(both: tuple[Scan, list[ScanRecord], Scan, list[ScanRecord]]) -> None:
    _, torch_records, _, onnx_records = both
    for one, other in zip(torch_records, onnx_records, strict=True):
        assert one.preview is not None
        assert np.array_equal(one.preview, other.preview)
        assert one.heatmaps is not None
        assert other.heatmaps is not None
        assert one.heatmaps.keys() == other.heatmaps.keys()
        for name, heat in one.heatmaps.items():
            assert np.abs(heat - other.heatmaps[name]).max() < MARGIN


def test_the_same_of_models_and_policy(
    both: tuple[Scan, list[ScanRecord], Scan, list[ScanRecord]],
) -> None:
    one, torch_records, other, onnx_records = both
    assert one.policy_id == other.policy_id
    assert one.rules == other.rules
    (a,), (b,) = one.models, other.models
    assert (a.id, a.space, a.notes, a.uncovered) == (b.id, b.space, b.notes, b.uncovered)
    assert a.thresholds == pytest.approx(b.thresholds)
    assert (a.unseen, a.unseen_contrast) == (b.unseen, b.unseen_contrast)
    assert "jeans" in a.unseen_contrast
    counts = []
    for run, records in ((one, torch_records), (other, onnx_records)):
        summary = Summary(run.policy_id)
        for record in records:
            summary.add(record)
        counts.append(re.sub(r"[\d.]+ images/s", "", summary.line()))
    assert counts[0] == counts[1]


# -- the command -----------------------------------------------------------------------------


@pytest.fixture
def with_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit code and output of the command in this process."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["latentguard", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code if isinstance(end.value.code, int) else 0
        return code, capsys.readouterr().out

    return run


def test_a_run_without_torch(
    artifact: Path,
    both: tuple[Scan, list[ScanRecord], Scan, list[ScanRecord]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    ran = command_without_torch(
        [
            *("scan", EXAMPLES, "--runtime", "onnx", "--model", artifact, "--device", "cpu"),
            *("--run", run, "--sink", "json", "--workers", 1, "--fail-on", "never"),
        ]
    )
    assert ran.returncode == 0, ran.stderr
    (part,) = (run / "parts").iterdir()
    rows = [from_row(json.loads(line)) for line in part.read_text().splitlines()]
    alike(rows, [record.to_dict() for record in both[3]])


@pytest.mark.parametrize(
    "form", [*(pytest.param(form, marks=pytest.mark.slow) for form in ("table", "csv")), "json"]
)
def test_the_same_output_and_exit_code_without_torch(
    artifact: Path, tmp_path: Path, with_torch: Callable[..., tuple[int, str]], form: str
) -> None:
    page = tmp_path / "report.html"
    ran = command_without_torch(
        [
            *("scan", "--runtime", "onnx", "--model", artifact, EXAMPLES),
            *("--format", form, "--report", page, "--heatmap"),
        ]
    )
    expected = tmp_path / "expected.html"
    code, out = with_torch(
        *("scan", "--model", "nano-flux2", "--policy", "family", EXAMPLES),
        *("--format", form, "--report", expected, "--heatmap"),
    )
    assert (ran.returncode, code) == (1, 1), ran.stderr
    assert "Traceback" not in ran.stderr
    if form == "json":
        lines = [[json.loads(line) for line in text.splitlines()] for text in (ran.stdout, out)]
        alike(*lines)
        return

    def rows(text: str) -> list[str]:
        changing = re.compile(rf"images/s|report:|\b{TIED}\b")
        kept = [line for line in text.splitlines() if not changing.search(line)]
        return [digits_out(" ".join(line.split())) for line in kept]

    assert rows(ran.stdout) == rows(out)
    cards = [file.read_text().count("<article") for file in (page, expected)]
    assert cards[0] == cards[1] > 0


def test_every_kind_of_file_without_torch(artifact: Path, tmp_path: Path, arrays: Any) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    batch = Latents(torch.from_numpy(arrays[15:17]).to(torch.bfloat16), "flux2", True)
    save_latents(folder / "a.pt", batch)
    save_latents(folder / "b.safetensors", batch)
    save_latents(folder / "c.pt", batch.to_packed())
    np.save(folder / "d.npy", arrays[15:17])
    np.savez(folder / "e.npz", latents=arrays[15:17], space="flux2", scaled=True)
    with tarfile.open(folder / "f.tar", "w") as archive:
        for key in ("one", "two"):
            info = tarfile.TarInfo(f"{key}.latent.pt")
            info.size = (folder / "a.pt").stat().st_size
            archive.addfile(info, io.BytesIO((folder / "a.pt").read_bytes()))
    ran = command_without_torch(
        ["scan", "--runtime", "onnx", "--model", artifact, folder, "--format", "json"]
    )
    assert ran.returncode == 1, ran.stderr
    records = [json.loads(line) for line in ran.stdout.splitlines()]
    names = [Path(record["source"]).name[:1] for record in records]
    assert names == [*"aabbccddee", "f", "f", "f", "f"]
    assert {record["decision"] for record in records} == {"block"}
    assert {record["error"] for record in records} == {None}
    assert {c["id"] for record in records for c in record["concepts"] if c["matched"]} >= {
        "firearms"
    }


def test_exit_codes(artifact: Path, tmp_path: Path, with_torch: Any, arrays: np.ndarray) -> None:
    calm, armed, bad = (tmp_path / name for name in ("calm.npy", "armed.npy", "bad.npy"))
    np.save(calm, arrays[:2])
    np.save(armed, arrays[15:17])
    bad.write_bytes(b"nothing")
    scan = ("scan", "--runtime", "onnx", "--model", artifact, "--format", "json")
    says = ("--space", "flux2", "--scaled")
    assert with_torch(*scan, calm, *says)[0] == 0
    assert with_torch(*scan, armed, *says)[0] == 1
    assert with_torch(*scan, armed, *says, "--fail-on", "never")[0] == 0
    assert with_torch(*scan, calm, bad, *says)[0] == 3
    assert with_torch(*scan, calm, "--space", "sdxl")[0] == 2
    assert with_torch("scan", "--runtime", "onnx", calm, *says)[0] == 0
    assert with_torch("scan", "--runtime", "onnx", calm, *says, "--model", "latent-clip-b8")[0] == 2
    assert with_torch("scan", "--runtime", "onnx", "--model", bad, calm)[0] == 2


def test_the_pin(artifact: Path, with_torch: Any) -> None:
    digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    scan = ("scan", "--runtime", "onnx", "--model", artifact, EXAMPLES, "--format", "json")
    assert with_torch(*scan, "--sha256", digest)[0] == 1
    assert with_torch(*scan, "--sha256", digest[::-1]) == (2, "")


def test_a_file_that_names_a_policy_and_judges_by_other_thresholds(
    artifact: Path, tmp_path: Path
) -> None:
    model = onnx.load(artifact)
    metadata = json.loads(next(e.value for e in model.metadata_props if e.key == METADATA))
    for concept in metadata["policy"]["concepts"]:
        concept["threshold"]["value"] = 0.999
    path = tmp_path / "mild.onnx"
    path.write_bytes(write_metadata(model, metadata))
    with pytest.raises(PolicyError, match=r"names policy 'family' .* are not those of that policy"):
        Scan(EXAMPLES, "family", path, runtime="onnx")
    assert Scan(EXAMPLES, "family", artifact, runtime="onnx").policy_id.name == "family"


def test_another_policy_is_named_with_the_way_to_it(artifact: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy 'family' .*'weapons' .*latentguard export swap"):
        Scan(EXAMPLES, "weapons", artifact, runtime="onnx")
    # The one that it was exported with may be said.
    assert Scan(EXAMPLES, "family", artifact, runtime="onnx").policy_id.name == "family"
    assert (
        Scan(EXAMPLES, load_policy("family"), artifact, runtime="onnx").rules.policy.name
        == "family"
    )


def test_wrong_options_raise_at_once(artifact: Path) -> None:
    for runtime in ("onnx", "torch"):
        with pytest.raises(ModelError, match=r"--sha256 pins an exported file: give --model FILE"):
            Scan(EXAMPLES, sha256="0" * 64, runtime=runtime)
    with pytest.raises(ModelError, match=r"is an exported file: give --runtime onnx"):
        Scan(EXAMPLES, model=artifact, runtime="torch")
    for model in ("latent-clip-b8", "own.safetensors"):
        with pytest.raises(ModelError, match=f"model {model} needs torch"):
            Scan(EXAMPLES, model=model, runtime="onnx")
    with pytest.raises(ModelError, match="nothing: is not a file; give one that"):
        Scan(EXAMPLES, model="nothing", runtime="onnx")
    with pytest.raises(ModelError, match="reads flux2 latents, not sdxl"):
        Scan(EXAMPLES, model=artifact, runtime="onnx", space="sdxl")
    with pytest.raises(LatentsError, match="sdxxl"):
        Scan(EXAMPLES, model=artifact, runtime="onnx", space="sdxxl")
    for device in ("tpu", "cpu:1", "cuda:x"):
        with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
            Scan(EXAMPLES, model=artifact, runtime="onnx", device=device)


def test_devices_as_onnx_runtime_calls_them() -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    assert _providers(None) is None
    assert _providers("cpu") == [cpu]
    assert _providers("cuda") == [(cuda, {"device_id": "0"}), cpu]
    assert _providers("cuda:3") == [(cuda, {"device_id": "3"}), cpu]


def test_files_that_cannot_be_judged_are_the_same_errors(
    artifact: Path, tmp_path: Path, arrays: np.ndarray
) -> None:
    sdxl, other_size = tmp_path / "sdxl.pt", tmp_path / "size.npz"
    save_latents(sdxl, Latents(torch.zeros(1, 4, 64, 64), "sdxl", True))
    np.savez(other_size, latents=np.zeros((2, 32, 16, 16), np.float32), space="flux2", scaled=True)
    nan = tmp_path / "nan.npz"
    broken = arrays[:2].copy()
    broken[1, 0, 0, 0] = np.nan
    np.savez(nan, latents=broken, space="flux2", scaled=True)
    (tmp_path / "rubbish.pt").write_bytes(b"PK\x03\x04" + b"\0" * 99)
    paths = [sdxl, nan, tmp_path / "rubbish.pt", tmp_path / "missing.pt"]
    one = list(Scan(paths, "family", "nano-flux2"))
    other = list(Scan(paths, model=artifact, runtime="onnx"))
    assert [r.failed for r in other] == [True, False, True, True, True]
    for a, b in zip(one, other, strict=True):
        alike(a.to_dict(), b.to_dict())
    # An export for one size judges no other.
    records = list(Scan([other_size, EXAMPLES], model=artifact, runtime="onnx", batch_size=8))
    assert [r.failed for r in records] == [True, True] + [False] * 25
    assert "was exported for 32x32 latent cells, got 16x16" in str(records[0].verdict.error)
    assert records[0].verdict.decision == "block"


def test_an_image_that_fails_fails_alone(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Network._run

    def fails(self: Network, array: np.ndarray) -> Any:
        if len(array) > 1 or array.std() == pytest.approx(marked, abs=1e-6):
            raise RuntimeError("out of something")
        return run(self, array)

    scan = Scan(EXAMPLES, model=artifact, runtime="onnx", batch_size=5)
    first = next(iter(Scan(EXAMPLES, model=artifact, runtime="onnx")._records)).latents
    assert first is not None
    marked = first.array.astype(np.float32).std()
    monkeypatch.setattr(Network, "_run", fails)
    records = list(scan)
    assert [r.failed for r in records] == [True] + [False] * 24
    assert records[0].verdict.decision == "block"
    assert "out of something" in str(records[0].verdict.error)


def test_a_file_without_heat_maps_says_so(artifact: Path) -> None:
    run = Scan(EXAMPLES, model=artifact, runtime="onnx", heatmaps=True)
    guard = inspect.getclosurevars(run._judges.of("flux2").judge).nonlocals["guard"]
    guard._main.has_heatmaps = False
    records = list(run)
    assert all(record.heatmaps is None and not record.failed for record in records)
    assert len(run.notes) == 1
    assert run.notes[0].endswith("guard.onnx: was exported without heat maps: use --heatmaps")


@pytest.mark.parametrize(("said", "threads"), [("1", 1), ("", None), ("2,2", None)])
def test_threads_are_those_of_the_environment_and_do_not_spin(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, said: str, threads: int | None
) -> None:
    """Ray sets them to the cores of an actor; readers need what spinning threads would take."""
    made: list[tuple[Any, ...]] = []
    create = network.create_session

    def watched(*args: Any) -> Any:
        made.append(args[2:])
        return create(*args)

    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(network, "create_session", watched)
    for policy, model in ((load_policy("family"), "nano-flux2"), (None, artifact)):
        assert not isinstance(make_judges(policy, model, runtime="onnx").of("flux2"), str)
    assert made == [(threads, False)] * 2
