"""runtime.Guard on a real export: PyTorch's verdicts, by any thread, provider and layout."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from runtime_helpers import MARGIN, ROOT, same

from latentguard import Scorer, load_policy
from latentguard.errors import LatentsError, ModelError
from latentguard.files import read_arrays
from latentguard.judge import Verdict
from latentguard.runtime import Batching, Guard
from latentguard.runtime import network as network_module
from latentguard.runtime.batching import Outputs
from latentguard.runtime.network import Network
from latentguard.spaces import SPACES, LatentArray, Latents, LatentSpace


@pytest.fixture(scope="module")
def expected(latents: Latents) -> list[Verdict]:
    return Scorer(load_policy("family"), "nano-flux2", device="cpu").verdicts(latents)


def test_pytorchs_verdicts(guard: Guard, arrays: np.ndarray, expected: list[Verdict]) -> None:
    found = guard.scan(arrays)
    same(found, expected)
    assert {v.decision for v in found} == {"allow", "review", "block"}


def test_what_a_guard_says_of_itself(guard: Guard, artifact: Path) -> None:
    policy = load_policy("family")
    assert guard.policy == policy.to_dict()
    assert guard.model[0] == "nano-flux2"
    assert (guard.space, guard.scaled) == ("flux2", True)
    assert guard.sha256 == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert guard.providers[-1] == "CPUExecutionProvider"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_dtypes(
    guard: Guard, latents: Latents, expected: list[Verdict], dtype: type[np.floating]
) -> None:
    # The bundled latents are float16, so every one of these holds them exactly.
    same(guard.scan(latents.tensor.numpy().astype(dtype)), expected)


def test_packed_latents(guard: Guard, latents: Latents, expected: list[Verdict]) -> None:
    tokens = latents.to_packed().tensor.numpy()
    assert tokens.shape == (25, 256, 128)
    same(guard.scan(tokens, height=32, width=32), expected)
    same(guard.scan(tokens[:3].astype(np.float32), height=32, width=32), expected[:3])


def test_latents_that_carry_their_convention(
    guard: Guard, arrays: np.ndarray, expected: list[Verdict]
) -> None:
    flux2 = SPACES["flux2"].with_batch_norm([0.5] * 128, [3.0] * 128)
    scaled = LatentArray(arrays, flux2, True)
    same(guard.scan(scaled), expected)
    same(guard.scan(scaled.to_raw()), expected)
    for record, verdict in zip(
        read_arrays(ROOT / "examples" / "latents.pt"), expected, strict=True
    ):
        assert record.latents is not None
        same(guard.scan(record.latents), [verdict])
    with pytest.raises(LatentsError, match=r"guard\.onnx reads flux2 latents, not sdxl"):
        guard.scan(LatentArray(arrays[:, :4], SPACES["sdxl"], True))
    with pytest.raises(LatentsError, match=r"raw latents need|scaled latents need"):
        guard.scan(LatentArray(arrays, SPACES["flux2"], False))


@pytest.mark.parametrize("scaled", [True, False])
def test_latents_are_judged_in_the_scaling_that_the_file_reads(
    artifact: Path, scaled: bool
) -> None:
    guard = Guard(artifact, threads=1, warm_up=False)
    guard.metadata.update(space="sdxl", scaled=scaled)
    sdxl = SPACES["sdxl"]
    own = replace(sdxl, scale=0.5, shift=0.0)  # a file may say that its scaling is another one
    array = np.ones((1, 4, 2, 2), np.float16)
    given = [
        guard._converted(LatentArray(array, space, is_scaled))
        for space, is_scaled in ((sdxl, True), (sdxl, False), (own, True), (own, False))
    ]
    raw = [1 / 0.13025, 1, 2, 1]
    expected = [value * 0.13025 for value in raw] if scaled else raw
    assert [float(item.mean()) for item in given] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_both_runtimes_give_a_model_the_same_numbers(
    artifact: Path, scaled: bool, dtype: torch.dtype
) -> None:
    guard = Guard(artifact, threads=1, warm_up=False)
    guard.metadata.update(space="sdxl", scaled=scaled)
    scorer = Scorer("family", "nano-sdxl", device="cpu")
    raw = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5 + 1
    for space in (SPACES["sdxl"], LatentSpace.get("sdxl-playground25")):
        for is_scaled in (True, False):
            tensor = (space.to_scaled(raw) if is_scaled else raw).to(dtype)
            given = Latents(tensor, space, is_scaled)
            ours = scorer._input(given)[0] if scaled else given.to_standard(False).tensor.float()
            theirs = guard._converted(LatentArray(tensor.numpy(), space, is_scaled))
            # Three roundings of float32: half precision is converted in it.
            torch.testing.assert_close(ours, torch.from_numpy(theirs).float(), rtol=1e-6, atol=1e-6)
            expected = SPACES["sdxl"].to_scaled(raw) if scaled else raw
            tolerance = 2e-2 if dtype is torch.float16 else 1e-4
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_decisions_are_the_same_in_every_convention(
    guard: Guard, latents: Latents, expected: list[Verdict]
) -> None:
    scorer = Scorer("family", "nano-flux2", device="cpu")
    flux2 = SPACES["flux2"].with_batch_norm([0.5] * 128, [3.0] * 128)
    scaled = Latents(latents.tensor.float(), flux2, True)
    for form in (scaled, scaled.to_raw(), scaled.to_packed(), scaled.to_raw().to_packed()):
        array = LatentArray(form.to_spatial().tensor.numpy(), flux2, form.scaled)
        decisions = [verdict.decision for verdict in scorer.verdicts(form)]
        assert decisions == [verdict.decision for verdict in expected]
        assert decisions == [verdict.decision for verdict in guard.scan(array)]


def test_packed_latents_of_a_false_size_are_refused(guard: Guard, latents: Latents) -> None:
    scorer = Scorer("family", "nano-flux2", device="cpu")
    tokens = latents.to_packed().tensor.float()
    for height, width in ((16, 64), (64, 16), (8, 128), (128, 8), (2, 512)):
        with pytest.raises(LatentsError, match=f"said to be of {height}x{width} cells"):
            scorer.verdicts(Latents(tokens, "flux2", True, "packed", height, width))
        with pytest.raises(LatentsError, match=f"said to be of {height}x{width} cells"):
            guard.scan(tokens.numpy(), height=height, width=width)


def test_views_of_other_arrays(guard: Guard, arrays: np.ndarray, expected: list[Verdict]) -> None:
    arrays, expected = arrays[12:18], expected[12:18]
    wide = np.zeros((6, 32, 32, 64), np.float32)
    wide[..., ::2] = arrays
    same(guard.scan(wide[..., ::2]), expected)
    same(guard.scan(np.asfortranarray(arrays)), expected)
    same(guard.scan(arrays[::-1]), expected[::-1])
    frozen = arrays.copy()
    frozen.setflags(write=False)
    same(guard.scan(frozen), expected)
    same(guard.scan(arrays.astype(">f4")), expected)


def test_scores_embeddings_and_heat_maps(
    guard: Guard, latents: Latents, arrays: np.ndarray
) -> None:
    scorer = Scorer(load_policy("family"), "nano-flux2", device="cpu")
    scores, outputs = scorer.score(latents), guard.scores(arrays)
    assert np.abs(outputs["margin"] - scores.margin.detach().numpy()).max() < MARGIN
    embedded = guard.embed(arrays)
    assert embedded.dtype == np.float32
    assert np.linalg.norm(embedded, axis=1) == pytest.approx(np.ones(25), abs=1e-5)
    heats = guard.heatmaps(arrays[:4])
    assert heats.shape[:2] == (4, len(guard.policy["concepts"]))
    assert np.abs(heats - scorer.heatmaps(latents[:4])).max() < MARGIN


def test_heat_maps_that_fail_cost_no_verdict(
    artifact: Path, arrays: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(artifact, threads=1)
    expected = guard.judge(arrays, heatmaps=True)
    assert expected.heatmaps is not None
    assert expected.heatmaps.margins is not None
    run = Network._run_for

    def fails(self: Network, array: np.ndarray, names: Sequence[str]) -> Outputs:
        if "heatmap" in names:
            raise MemoryError("no room for heat maps")
        return run(self, array, names)

    def of_another_shape(self: Network, array: np.ndarray, names: Sequence[str]) -> Outputs:
        outputs = run(self, array, names)
        return outputs | {name: outputs[name][:, :2] for name in names if name == "heatmap"}

    for broken, message in ((fails, "no room for heat maps"), (of_another_shape, "must be")):
        monkeypatch.setattr(Network, "_run_for", broken)
        found = guard.judge(arrays, heatmaps=True)
        same(list(found.verdicts), list(expected.verdicts))
        assert found.heatmaps is not None
        assert found.heatmaps.margins is None
        assert message in str(found.heatmaps.problem)


def test_an_array_larger_than_a_run(
    guard: Guard, arrays: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "RUN_CELLS", 3 * 32 * 32 + 5)
    pieces: list[int] = []
    run = guard._main._run
    monkeypatch.setattr(guard._main, "_run", lambda part: pieces.append(len(part)) or run(part))
    margins = guard.scores(arrays[:8])["margin"]
    assert pieces == [3, 3, 2]
    monkeypatch.undo()
    assert np.abs(margins - guard.scores(arrays[:8])["margin"]).max() < MARGIN


def test_the_noise_level_and_what_follows(guard: Guard, arrays: np.ndarray) -> None:
    verdicts = guard.scan(arrays[:1], noise_level=0.5, final=False)
    assert verdicts[0].noise_level == 0.5
    for wrong in (-1.0, float("nan")):
        (verdict,) = guard.scan(arrays[:1], noise_level=wrong)
        assert verdict.decision == "block"
        assert "noise_level" in str(verdict.error)


# -- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [None, Batching(max_batch=8, max_delay_ms=5)])
def test_many_threads_get_the_verdicts_of_their_own_images(
    artifact: Path, arrays: np.ndarray, expected: list[Verdict], batching: Batching | None
) -> None:
    with Guard(artifact, threads=1, batching=batching) as guard, ThreadPoolExecutor(16) as pool:
        jobs = [(n * 7 % 25, 1 + n % 3) for n in range(40)]
        found = pool.map(lambda job: guard.scan(arrays[job[0] : job[0] + job[1]]), jobs)
        for (start, count), verdicts in zip(jobs, found, strict=True):
            same(verdicts, expected[start : start + count])


def test_a_warm_guard_has_run_before_the_first_request(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run = Network._run

    def counted(self: Network, array: np.ndarray) -> dict[str, np.ndarray]:
        ran.append(len(array))
        return run(self, array)

    monkeypatch.setattr(Network, "_run", counted)
    Guard(artifact, threads=1)
    assert ran == [1]
    Guard(artifact, threads=1, warm_up=False)
    assert ran == [1]


def test_closing(artifact: Path, arrays: np.ndarray) -> None:
    before = threading.active_count()
    with Guard(artifact, threads=1, batching=Batching()) as guard:
        guard.scan(arrays[:1])
        assert threading.active_count() > before
    names = [thread.name for thread in threading.enumerate()]
    assert "latentguard" not in names


# -- providers -------------------------------------------------------------------------------


def test_a_provider_that_is_missing(artifact: Path) -> None:
    with pytest.raises(ModelError, match=r"has no NoSuchExecutionProvider here, it has .*CPU"):
        Guard(artifact, providers=["NoSuchExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ModelError, match="has no provider here"):
        Guard(artifact, providers=[])


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this machine has CUDA",
)
def test_cuda_is_never_replaced_in_silence(artifact: Path) -> None:
    with pytest.raises(ModelError, match=r"has no CUDAExecutionProvider here.*onnxruntime-gpu"):
        Guard(artifact, providers=["CUDAExecutionProvider"])
    assert Guard(artifact, warm_up=False).providers == ("CPUExecutionProvider",)


def test_a_provider_with_options(artifact: Path, arrays: np.ndarray) -> None:
    guard = Guard(artifact, providers=[("CPUExecutionProvider", {"use_arena": "0"})], threads=1)
    assert guard.scan(arrays[:1])[0].error is None


def test_threads_that_do_not_spin(artifact: Path, arrays: np.ndarray, guard: Guard) -> None:
    still = Guard(artifact, threads=2, spin=False)
    options = still._main._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    found = still.scores(arrays[:3])["margin"]
    np.testing.assert_allclose(found, guard.scores(arrays[:3])["margin"], atol=MARGIN)


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs onnxruntime-gpu and a CUDA device",
)
def test_io_binding_on_cuda(artifact: Path, arrays: np.ndarray, expected: list[Verdict]) -> None:
    guard = Guard(artifact, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    with ThreadPoolExecutor(8) as pool:
        for verdicts in pool.map(guard.scan, [arrays] * 8):
            assert [v.decision for v in verdicts] == [v.decision for v in expected]


@pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs onnxruntime-openvino in place of onnxruntime",
)
@pytest.mark.parametrize("options", [{}, {"device_type": "CPU", "num_of_threads": "1"}])
def test_pytorchs_verdicts_on_openvino(
    artifact: Path, arrays: np.ndarray, expected: list[Verdict], options: dict[str, str]
) -> None:
    guard = Guard(artifact, providers=[("OpenVINOExecutionProvider", options)])
    assert guard.providers[0] == "OpenVINOExecutionProvider"
    # Batches of several sizes, from several threads.
    with ThreadPoolExecutor(4) as pool:
        for size, verdicts in pool.map(lambda n: (n, guard.scan(arrays[:n])), [1, 25, 7, 1, 16]):
            same(verdicts, expected[:size])
    assert guard.heatmaps(arrays[:2]).shape[0] == 2
    spoiled = arrays[:2].copy()
    spoiled[1, 0, 0, 0] = np.nan
    assert [verdict.error is None for verdict in guard.scan(spoiled)] == [True, False]


def test_the_path_that_binds_outputs(artifact: Path, arrays: np.ndarray) -> None:
    """The code of GPU providers, on the CPU: same numbers, from many threads."""
    plain, bound = Guard(artifact, threads=1), Guard(artifact, threads=1)
    bound._main._bind = True
    expected = plain.scores(arrays[:3])
    with ThreadPoolExecutor(8) as pool:
        for outputs in pool.map(bound.scores, [arrays[:3]] * 16):
            for name, values in expected.items():
                assert np.array_equal(outputs[name], values)
